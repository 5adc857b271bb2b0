"""Scores of generated images against real images."""

from dig_jax.evaluation.digits import nearest_training_images, score_digits
from dig_jax.evaluation.moments import frechet_distance

__all__ = ["frechet_distance", "nearest_training_images", "score_digits"]
