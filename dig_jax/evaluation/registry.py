"""The evaluators, and which of them apply to the data of a config."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from dig_jax.config import Config
from dig_jax.evaluation.digits import DigitsEvaluator

Scores = dict[str, Any]


@runtime_checkable
class Evaluator(Protocol):
    """A method to score generated images against real images."""

    def applies_to(self, settings: Config) -> bool:
        """Return whether this evaluator can score images of a model that was trained with these settings."""
        ...

    def score(self, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]) -> Scores:
        """Return figures for scores.json, by name. Names differ between evaluators of the same data.

        Args:
            images: generated images.
            labels: the class that each image was generated for.

        Raises:
            ValueError: too few images.
        """
        ...

    def summary(self, scores: Scores) -> str:
        """Return the most important figures in one line for the log."""
        ...

    def nearest_training_images(self, images: UInt8[np.ndarray, "n h w c"]) -> Int[np.ndarray, " n"] | None:
        """Return the index of the training image nearest to each image, or None if this is not measured."""
        ...


EVALUATORS: dict[str, Evaluator] = {"digits": DigitsEvaluator()}


def evaluators_for(settings: Config) -> list[Evaluator]:
    """Return the evaluators that apply; none if `config.evaluation.num_images` is 0."""
    if not settings.evaluation.num_images:
        return []
    return [evaluator for evaluator in EVALUATORS.values() if evaluator.applies_to(settings)]
