"""Denoising networks: DiG, U-DiG and the DiT baseline."""

from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.registry import create_model

__all__ = ["DiffusionTransformer", "create_model"]
