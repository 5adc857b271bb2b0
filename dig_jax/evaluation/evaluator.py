"""The interface of an evaluator, which scores a stream of images."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.evaluation.image_sets import Images
from dig_jax.files.paths import Path

Scores = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Images to score.

    Attributes:
        components: the settings, and the sources of real images.
        images: the images.
        count: how many of them to score.
        labels: the class that each image was generated for; None if the images are not from a model.
        folder: where process 0 keeps the files with which an interrupted evaluation resumes; None: nowhere.
    """

    components: Components
    images: Images
    count: int
    labels: Int[np.ndarray, " n"] | None = None
    folder: Path | None = None


class Accumulator(abc.ABC):
    """Takes the images of a task one part after the other.

    Attributes:
        first: images before this index were taken before an interruption.
    """

    first: int = 0

    @abc.abstractmethod
    def add(self, indices: Int[np.ndarray, " n"], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Take images and their indices in the task's set.

        Raises:
            ValueError: invalid images.
        """

    @abc.abstractmethod
    def scores(self) -> Scores:
        """Return figures for scores.json, by name. All processes call it, each with its own images.

        Raises:
            ValueError: too few images.
        """


class Evaluator(abc.ABC):
    """Scores images against real images.

    Attributes:
        needs_labels: whether it scores only images of a model.
    """

    needs_labels = False

    @abc.abstractmethod
    def applies_to(self, settings: Config) -> bool:
        """Return whether this evaluator scores images of a model that was trained with these settings."""

    @abc.abstractmethod
    def rankings(self, settings: Config) -> Mapping[str, bool]:
        """Return the figures that checkpoints can be chosen by, and whether a higher value is better."""

    @abc.abstractmethod
    def check(self, components: Components) -> None:
        """Validate what would otherwise fail at the first score, after hours of training.

        Raises:
            UserError: missing weights, or invalid settings.
        """

    @abc.abstractmethod
    def start(self, task: Task) -> Accumulator:
        """Return an accumulator of the task's images. Names of figures differ between evaluators.

        Raises:
            UserError: missing weights or an invalid reference.
        """

    @abc.abstractmethod
    def summary(self, scores: Mapping[str, Any]) -> str:
        """Return the most important figures in one line for the log."""

    def nearest_training_images(self, images: UInt8[np.ndarray, "n h w c"]) -> Int[np.ndarray, " n"] | None:
        """Return the index of the training image nearest to each image, or None if this is not measured."""
        return None
