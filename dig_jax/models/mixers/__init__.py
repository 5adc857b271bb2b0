"""Token mixers: each is called with tokens in raster order and their grid."""

from dig_jax.models.mixers.gla import GatedLinearAttention, parse_half_life
from dig_jax.models.mixers.local import LocalAttention
from dig_jax.models.mixers.softmax import SoftmaxAttention

__all__ = ["GatedLinearAttention", "LocalAttention", "SoftmaxAttention", "parse_half_life"]
