"""Scores of generated digits, computed with scikit-learn from the digits data set.

How to read the figures:

- `accuracy`: fraction of images that a support-vector classifier, trained on the training split, assigns to
  the requested class. It rewards clear digits but not variety: ten good images, repeated, would score 1.
- `frechet_distance`: between generated and held-out images. It detects blur and lack of variety, but a copy
  of the training set would score as well as `frechet_distance_real`.
- `nearest_distance_generated`: detects such copies, by falling far below `nearest_distance_heldout`.

The Fréchet distance has a bias that decreases with the number of images. `frechet_distance_real` uses all
training images; `frechet_distance_real_same_size` uses as many as were generated. The held-out images have
equal shares of the classes, so the generated images should have equal shares, too.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64, Int, UInt8

from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.data.digits import digits
from dig_jax.data.pipeline import normalize
from dig_jax.evaluation.evaluator import Accumulator, Evaluator, Scores, Task
from dig_jax.evaluation.moments import frechet_distance
from dig_jax.parallel import gather_arrays

if TYPE_CHECKING:
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

COMPONENTS = 20
_SUBSETS = 20


class DigitsEvaluator(Evaluator):
    """The evaluator of the digits data set."""

    needs_labels = True

    def applies_to(self, settings: Config) -> bool:
        """Return whether the model was trained on digits."""
        return settings.data.name == "digits"

    def rankings(self, settings: Config) -> Mapping[str, bool]:
        """Return Fréchet distance and accuracy."""
        return {"frechet_distance": False, "accuracy": True}

    def check(self, components: Components) -> None:
        """Scores of digits need no files."""

    def start(self, task: Task) -> Accumulator:
        """Collect the images, which are small."""
        assert task.labels is not None
        return _Images(task.labels)

    def summary(self, scores: Mapping[str, Any]) -> str:
        """Return accuracy and Fréchet distance, each with its value for real images."""
        ratio = scores["frechet_distance"] / scores["frechet_distance_real"]
        return (
            f"accuracy {scores['accuracy']:.1%} on {scores['num_images']} generated digits"
            f" (real held-out digits: {scores['classifier_heldout_accuracy']:.1%}),"
            f" Fréchet distance {scores['frechet_distance']:.3f}"
            f" (real training digits: {scores['frechet_distance_real']:.3f}, ratio {ratio:.2f})"
        )

    def nearest_training_images(self, images: UInt8[np.ndarray, "n size size 1"]) -> Int[np.ndarray, " n"]:
        """Return the index of the training image nearest to each image."""
        return nearest_training_images(images)[0]


class _Images(Accumulator):
    """All images of a task."""

    def __init__(self, labels: Int[np.ndarray, " n"]):
        self._labels = labels
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, indices: Int[np.ndarray, " n"], images: UInt8[np.ndarray, "n size size 1"]) -> None:
        """Keep the images."""
        self._parts.append((indices, images))

    def scores(self) -> Scores:
        """Return the scores of the images of all processes."""
        parts = self._parts or [(np.zeros(0, int), np.zeros((0, 8, 8, 1), np.uint8))]
        indices, images = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        everywhere = gather_arrays({"indices": indices, "images": images})
        everywhere = [part for part in everywhere if len(part["indices"])]  # a process may have none
        indices, images = (
            np.concatenate([part[name] for part in everywhere]) for name in ("indices", "images")
        )
        order = np.argsort(indices)
        return score_digits(images[order], self._labels[indices[order]])


def score_digits(
    images: UInt8[np.ndarray, "n size size 1"], labels: Int[np.ndarray, " m"]
) -> dict[str, float | int | str]:
    """Score generated digits; see the module's docstring for how to read the figures.

    Args:
        images: at least 2 images with pixels 0 … 255, bright on dark as in the data set. They are compared
            with the digits of the same size.
        labels: the class that each image was generated for, 0 … 9.

    Returns:
        accuracy: fraction of images that the classifier assigns to the requested class.
        classifier_heldout_accuracy: the same for the real held-out images, an upper bound.
        frechet_distance: between generated and held-out images, in `feature_space`.
        frechet_distance_real: between all training images and held-out images.
        frechet_distance_real_same_size: the same for subsets of num_images training images, averaged.
        nearest_distance_generated, nearest_distance_heldout: median Euclidean distance to the nearest
            training image, over all pixels in [-1, 1].
        num_images, num_train_images, num_heldout_images, feature_space, classifier, heldout_fingerprint:
            sizes, methods and data that the figures depend on.

    Raises:
        ValueError: images and labels differ in number, there are fewer than 2, or a label is not in 0 … 9.
    """
    if len(images) != len(labels):
        raise ValueError(
            f"numbers of images and labels differ: got {len(images)} and {len(labels)};"
            " expected equal numbers"
        )
    if len(images) < 2:
        raise ValueError(f"too few images to score: got {len(images)}; expected at least 2")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"labels out of range: got {labels.min()} … {labels.max()}; expected 0 … 9")
    size = images.shape[1]
    real = _real_digits(size)
    generated = _flat(images)
    generated_features = real.pca.transform(generated)
    _, nearest_generated = nearest_training_images(images)
    _, nearest_heldout = nearest_training_images(digits("heldout", size).images)
    return {
        "accuracy": float(np.mean(real.classifier.predict(generated) == labels)),
        "classifier_heldout_accuracy": real.heldout_accuracy,
        "frechet_distance": frechet_distance(generated_features, real.heldout_features),
        "frechet_distance_real": frechet_distance(real.train_features, real.heldout_features),
        "frechet_distance_real_same_size": _real_distance(size, len(images)),
        "nearest_distance_generated": float(np.median(nearest_generated)),
        "nearest_distance_heldout": float(np.median(nearest_heldout)),
        "num_images": len(images),
        "num_train_images": len(real.train_features),
        "num_heldout_images": len(real.heldout_features),
        "feature_space": f"pixels in [-1, 1], PCA to {COMPONENTS} components fitted on the train split",
        "classifier": repr(real.classifier),
        "heldout_fingerprint": digits("heldout", size).fingerprint,
    }


def nearest_training_images(
    images: UInt8[np.ndarray, "n size size 1"],
) -> tuple[Int[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Find the training image nearest to each image, in any class.

    Args:
        images: digits as 8-bit pixels.

    Returns:
        Indices in the training split, and Euclidean distances over all pixels in [-1, 1]: exactly 0 for a
        copy, because the squares are summed as integers.
    """
    query = images.reshape(len(images), -1).astype(np.int64)
    train = digits("train", images.shape[1]).images.reshape(-1, query.shape[1]).astype(np.int64)
    squares = (query**2).sum(1)[:, None] - 2 * query @ train.T + (train**2).sum(1)  # [n, train]
    indices = squares.argmin(1)
    return indices, np.sqrt(squares[np.arange(len(images)), indices]) / 127.5


@dataclasses.dataclass(frozen=True, eq=False)
class _RealDigits:
    classifier: "SVC"
    heldout_accuracy: float
    pca: "PCA"
    train_features: Float64[np.ndarray, "n k"]
    heldout_features: Float64[np.ndarray, "m k"]


@functools.cache
def _real_digits(size: int) -> _RealDigits:
    """Return classifier and features of the real digits of a size, fitted to the training split only."""
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    train, heldout = digits("train", size), digits("heldout", size)
    train_pixels, heldout_pixels = _flat(train.images), _flat(heldout.images)
    classifier = SVC(C=10).fit(train_pixels, train.labels)
    pca = PCA(COMPONENTS, svd_solver="full").fit(train_pixels)
    return _RealDigits(
        classifier=classifier,
        heldout_accuracy=float(classifier.score(heldout_pixels, heldout.labels)),
        pca=pca,
        train_features=pca.transform(train_pixels),
        heldout_features=pca.transform(heldout_pixels),
    )


def _real_distance(size: int, count: int) -> float:
    """Return the Fréchet distance of `count` training images to the held-out ones, over fixed subsets."""
    real, random = _real_digits(size), np.random.default_rng(0)
    count = min(count, len(real.train_features))
    subsets = [random.choice(len(real.train_features), count, replace=False) for _ in range(_SUBSETS)]
    distances = [frechet_distance(real.train_features[subset], real.heldout_features) for subset in subsets]
    return float(np.mean(distances))


def _flat(images: UInt8[np.ndarray, "n size size 1"]) -> Float64[np.ndarray, "n pixels"]:
    return normalize(images).reshape(len(images), -1).astype(np.float64)
