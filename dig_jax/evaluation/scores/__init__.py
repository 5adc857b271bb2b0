"""Scores of generated images by features of networks, by the names of `config.evaluation.scores`."""

from dig_jax.errors import alternatives, suggest
from dig_jax.evaluation.scores.frechet import FrechetDistance
from dig_jax.evaluation.scores.inception_score import InceptionScore
from dig_jax.evaluation.scores.kernel import KernelDistance
from dig_jax.evaluation.scores.mind import SlicedDistance
from dig_jax.evaluation.scores.precision_recall import PrecisionRecall
from dig_jax.evaluation.scores.score import FeatureSet, Score

SCORES: dict[str, Score] = {
    "fid": FrechetDistance(),
    "sfid": FrechetDistance(output="spatial"),
    "is": InceptionScore(split_size=5000),
    "is_torch_fidelity": InceptionScore(),
    "precision_recall": PrecisionRecall(),
    "precision_recall_float16": PrecisionRecall(half=True),
    "kid": KernelDistance(),
    "mind": SlicedDistance(),
    "fd_dinov2": FrechetDistance("dinov2_vitl14", "cls"),
    "mind_dinov2": SlicedDistance("dinov2_vitl14", "cls"),
}


def scores_named(names: tuple[str, ...]) -> dict[str, Score]:
    """Return scores by name.

    Raises:
        ValueError: an unknown or repeated name.
    """
    for name in names:
        if name not in SCORES:
            raise ValueError(
                f"unknown score {name!r}; expected {alternatives(list(SCORES))}{suggest(name, SCORES)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"repeated scores: got {','.join(names)}; expected each name once")
    return {name: SCORES[name] for name in names}


__all__ = ["SCORES", "FeatureSet", "Score", "scores_named"]
