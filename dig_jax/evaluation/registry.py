"""The evaluators, and which of them apply to the data of a config."""

from dig_jax.config import Config
from dig_jax.evaluation.digits import DigitsEvaluator
from dig_jax.evaluation.evaluator import Evaluator

EVALUATORS: dict[str, Evaluator] = {"digits": DigitsEvaluator()}


def evaluators_for(settings: Config) -> list[Evaluator]:
    """Return the evaluators that apply; none if `config.evaluation.num_images` is 0."""
    if not settings.evaluation.num_images:
        return []
    return [evaluator for evaluator in EVALUATORS.values() if evaluator.applies_to(settings)]
