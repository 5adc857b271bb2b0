"""DiT, the softmax attention baseline under the same recipe (Peebles & Xie 2023)."""

import functools

from dig_jax.models.backbone import Level, ModelOptions
from dig_jax.models.block_stack import BlockPattern
from dig_jax.models.blocks import BlockSpec
from dig_jax.models.layers import GeluMLP
from dig_jax.models.mixers import SoftmaxAttention


class DiTOptions(ModelOptions):
    """Options of DiT, which has only the common ones."""

    def pattern(self, level: Level) -> BlockPattern:
        """Return the one block, with softmax attention."""
        mixer = functools.partial(SoftmaxAttention, num_heads=self.heads_at(level))
        mlp = functools.partial(GeluMLP, hidden=self.mlp_width_at(level))
        return BlockPattern((BlockSpec(mixer=mixer, mlp=mlp),))
