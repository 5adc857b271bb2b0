"""The denoisers: DiG and the DiT baseline."""

from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.dig import DiG
from dig_jax.models.dit import DiT
from dig_jax.models.registry import create_model

__all__ = ["DiG", "DiT", "DiffusionTransformer", "create_model"]
