"""The interface of an evaluator, which scores generated images of certain data."""

import abc
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dig_jax.components import Components
from dig_jax.config import Config

Scores = dict[str, Any]


class Evaluator(abc.ABC):
    """Scores generated images against real images."""

    @abc.abstractmethod
    def applies_to(self, settings: Config) -> bool:
        """Return whether this evaluator scores images of a model that was trained with these settings."""

    @abc.abstractmethod
    def score(
        self, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"], components: Components
    ) -> Scores:
        """Return figures for scores.json, by name. Names differ between evaluators of the same data.

        Args:
            images: generated images.
            labels: the class that each image was generated for.
            components: the sources of real images, and the settings.

        Raises:
            ValueError: too few images.
        """

    @abc.abstractmethod
    def summary(self, scores: Scores) -> str:
        """Return the most important figures in one line for the log."""

    def nearest_training_images(self, images: UInt8[np.ndarray, "n h w c"]) -> Int[np.ndarray, " n"] | None:
        """Return the index of the training image nearest to each image, or None if this is not measured."""
        return None
