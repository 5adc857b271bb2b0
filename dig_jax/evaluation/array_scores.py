"""Scores as functions of arrays of features, for other programs."""

import numpy as np
from jaxtyping import Float

from dig_jax.evaluation.scores.inception_score import InceptionScore
from dig_jax.evaluation.scores.mind import SlicedDistance
from dig_jax.evaluation.scores.precision_recall import PrecisionRecall
from dig_jax.evaluation.scores.score import FeatureSet


def inception_score(
    logits: Float[np.ndarray, "n classes"],
    *,
    splits: int | None = None,
    protocol: str = "adm",
) -> float:
    """Return the Inception Score (Salimans et al. 2016), the mean over splits of the images.

    Args:
        logits: logits without bias, as both protocols use them.
        splits: number of splits. Default: splits of 5,000 images for "adm", 10 splits for "torch_fidelity".
        protocol: "adm" splits the images in order, "torch_fidelity" after a permutation of seed 2020.

    Raises:
        ValueError: an unknown protocol, fewer images than splits, or a number of splits in order that the
            images do not give.
    """
    if protocol not in ("adm", "torch_fidelity"):
        raise ValueError(f"unknown protocol {protocol!r}; expected adm or torch_fidelity")
    if splits is not None and not 1 <= splits <= len(logits):
        raise ValueError(f"invalid splits={splits} of {len(logits)} images; expected 1 to {len(logits)}")
    if protocol == "adm":
        size = 5000 if splits is None else -(-len(logits) // splits)
        given = -(-len(logits) // size)
        if splits not in (None, given):
            raise ValueError(
                f"invalid splits={splits} of {len(logits)} images: got {given} splits of at most {size} each;"
                f" expected splits={given} or another number of images"
            )
        score = InceptionScore(split_size=size)
    else:
        score = InceptionScore(splits=10 if splits is None else splits)
    return score(_set(logits=logits), None)[""]


def precision_recall(
    reference: Float[np.ndarray, "n d"], generated: Float[np.ndarray, "m d"], *, k: int = 3
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al. 2019); see `PrecisionRecall`.

    Args:
        reference: features of real images.
        generated: features of generated images.
        k: number of the neighbor whose distance is the radius around a vector.

    Returns:
        Fractions from 0 to 1.

    Raises:
        ValueError: a set has at most k vectors.
    """
    figures = PrecisionRecall(neighbors=k)(_set(pool=generated), _set(pool=reference))
    return figures["precision"], figures["recall"]


def mind(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Return the sliced Wasserstein distance (Bonneel et al. 2015) of two sets; see `SlicedDistance`.

    Args:
        a, b: features, in the same units; the distance is in these units, squared.

    Raises:
        ValueError: a set is empty.
    """
    return SlicedDistance()(_set(pool=a), _set(pool=b))[""]


def _set(**rows: Float[np.ndarray, "n d"]) -> FeatureSet:
    return FeatureSet(count=len(next(iter(rows.values()))), gaussians={}, rows=rows)
