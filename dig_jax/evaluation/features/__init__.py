"""Pretrained networks whose outputs scores compare."""

from dig_jax.evaluation.features.inception import inception_features
from dig_jax.evaluation.features.network import FeatureNetwork
from dig_jax.evaluation.features.registry import load_features

__all__ = ["FeatureNetwork", "inception_features", "load_features"]
