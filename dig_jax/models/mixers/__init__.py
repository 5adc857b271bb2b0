"""Token mixers. Those of images are called with tokens in raster order and their grid."""

from dig_jax.models.mixers.gla import GatedLinearAttention, parse_half_life
from dig_jax.models.mixers.local import LocalAttention
from dig_jax.models.mixers.softmax import SoftmaxAttention
from dig_jax.models.mixers.ssm import BidirectionalMamba

__all__ = [
    "BidirectionalMamba",
    "GatedLinearAttention",
    "LocalAttention",
    "SoftmaxAttention",
    "parse_half_life",
]
