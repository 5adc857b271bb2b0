"""Scores of generated images against real images."""

from dig_jax.evaluation.array_scores import inception_score, mind, precision_recall
from dig_jax.evaluation.digits import nearest_training_images, score_digits
from dig_jax.evaluation.features import inception_features, load_features
from dig_jax.evaluation.moments import Moments, frechet_distance
from dig_jax.evaluation.scores.kernel import kernel_distance

__all__ = [
    "Moments",
    "frechet_distance",
    "inception_features",
    "inception_score",
    "kernel_distance",
    "load_features",
    "mind",
    "nearest_training_images",
    "precision_recall",
    "score_digits",
]
