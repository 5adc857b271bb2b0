"""Scores of generated digits, computed with scikit-learn alone and from the real digits alone.

What each figure can and cannot tell:

- `accuracy`: how often a support-vector classifier, trained on the real training images, sees the class that
  was asked for. It rewards clear digits; ten perfect pictures repeated for ever would score 1.
- `frechet_distance`: between generated and real held-out images. It sees such a lack of variety, and blur;
  a copy of the training set would score as well as `frechet_distance_real` does.
- `nearest_distance_generated`: would show that copying, by falling far below `nearest_distance_heldout`.

A Fréchet distance shrinks as samples grow, so N generated images are at a disadvantage to all training images
(`frechet_distance_real`); `frechet_distance_real_same_size` gives real images the same N. Held-out images
have equal shares of the classes: ask for equal shares, or the distance counts the difference as an error.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int, UInt8

from dig_jax.data.pipeline import normalize
from dig_jax.data.source import digits
from dig_jax.evaluation.frechet import frechet_distance

if TYPE_CHECKING:
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

COMPONENTS = 20
_SUBSETS = 20


def score_digits(
    images: UInt8[np.ndarray, "n 8 8 1"], labels: Int[np.ndarray, " m"]
) -> dict[str, float | int | str]:
    """Scores generated digits; the module's docstring says how to read the figures.

    Args:
        images: at least 2, pixels 0 … 255, bright on dark as in the source.
        labels: the class that each was asked for, 0 … 9.

    Returns:
        accuracy: share of images recognised as the class asked for.
        classifier_heldout_accuracy: the same for the real held-out images: what the classifier can see.
        frechet_distance: generated against held-out images, in `feature_space`.
        frechet_distance_real: all training images against held-out images.
        frechet_distance_real_same_size: the mean over random choices of num_images training images.
        nearest_distance_generated, nearest_distance_heldout: median distance to the nearest training image,
            Euclidean over the 64 pixels in [-1, 1].
        num_images, num_train_images, num_heldout_images, feature_space, classifier, heldout_fingerprint:
            what these depend on.

    Raises:
        ValueError: for another number of labels than images, fewer than 2 images, or labels outside 0 … 9.
    """
    if len(images) != len(labels):
        raise ValueError(f"images and labels differ in number: {len(images)} and {len(labels)}")
    if len(images) < 2:
        raise ValueError(f"a score needs 2 or more images, got {len(images)}")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"labels of digits are 0 … 9, got {labels.min()} … {labels.max()}")
    real = _real_digits()
    generated = _flat(images)
    generated_features = real.pca.transform(generated)
    _, nearest_generated = nearest_training_images(images)
    _, nearest_heldout = nearest_training_images(digits("heldout").images)
    return {
        "accuracy": float(np.mean(real.classifier.predict(generated) == labels)),
        "classifier_heldout_accuracy": real.heldout_accuracy,
        "frechet_distance": frechet_distance(generated_features, real.heldout_features),
        "frechet_distance_real": frechet_distance(real.train_features, real.heldout_features),
        "frechet_distance_real_same_size": _real_distance(len(images)),
        "nearest_distance_generated": float(np.median(nearest_generated)),
        "nearest_distance_heldout": float(np.median(nearest_heldout)),
        "num_images": len(images),
        "num_train_images": len(real.train_features),
        "num_heldout_images": len(real.heldout_features),
        "feature_space": f"pixels in [-1, 1], PCA to {COMPONENTS} components fitted on the train split",
        "classifier": repr(real.classifier),
        "heldout_fingerprint": digits("heldout").fingerprint,
    }


def nearest_training_images(
    images: UInt8[np.ndarray, "n 8 8 1"],
) -> tuple[Int[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """The nearest real training digit of each image, of any class.

    Returns:
        Its index in the training split, and the Euclidean distance over the 64 pixels in [-1, 1]: exactly 0
        for a copy, since the squares are summed in whole numbers.
    """
    query = images.reshape(len(images), -1).astype(np.int64)
    train = digits("train").images.reshape(-1, query.shape[1]).astype(np.int64)
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
def _real_digits() -> _RealDigits:
    """Everything that is fitted to real digits: to the training split only."""
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    train, heldout = digits("train"), digits("heldout")
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


def _real_distance(size: int) -> float:
    """Fréchet distance of `size` training images from the held-out ones: a mean over fixed choices."""
    real, random = _real_digits(), np.random.default_rng(0)
    size = min(size, len(real.train_features))
    choices = [random.choice(len(real.train_features), size, replace=False) for _ in range(_SUBSETS)]
    distances = [frechet_distance(real.train_features[choice], real.heldout_features) for choice in choices]
    return float(np.mean(distances))


def _flat(images: UInt8[np.ndarray, "n 8 8 1"]) -> Float64[np.ndarray, "n 64"]:
    return normalize(images).reshape(len(images), -1).astype(np.float64)
