"""The evaluators, and which of them apply to the data of a config."""

from dig_jax.config import Config
from dig_jax.errors import ConfigError, alternatives, suggest
from dig_jax.evaluation.digits import DigitsEvaluator
from dig_jax.evaluation.evaluator import Evaluator
from dig_jax.evaluation.feature_scores import FeatureEvaluator

EVALUATORS: dict[str, Evaluator] = {"digits": DigitsEvaluator(), "features": FeatureEvaluator()}


def evaluators_for(settings: Config) -> list[Evaluator]:
    """Return the evaluators that apply; none if `config.evaluation.num_images` is 0."""
    if not settings.evaluation.num_images:
        return []
    return [evaluator for evaluator in EVALUATORS.values() if evaluator.applies_to(settings)]


def rankings(settings: Config) -> dict[str, bool]:
    """Return the figures that checkpoints can be chosen by, and whether a higher value is better.

    Raises:
        ConfigError: an unknown score.
    """
    return {
        name: higher
        for evaluator in evaluators_for(settings)
        for name, higher in evaluator.rankings(settings).items()
    }


def check_keep_best(settings: Config) -> None:
    """Check that training measures the figure that `checkpoint.keep_best_by` names.

    Raises:
        ConfigError: it does not.
    """
    name, figures = settings.checkpoint.keep_best_by, rankings(settings)
    if name == "heldout_loss":
        return
    if name not in figures:
        expected = ["heldout_loss", *figures]
        raise ConfigError(
            f"invalid config.checkpoint.keep_best_by={name!r}; expected {alternatives(expected)}"
            f"{suggest(name, expected)}"
        )
    if settings.evaluation.every_steps is None:
        raise ConfigError(
            f"config.checkpoint.keep_best_by={name!r} needs scores in training; set"
            " config.evaluation.every_steps"
        )
