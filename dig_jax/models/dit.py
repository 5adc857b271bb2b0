"""DiT, the softmax baseline under the same recipe (Peebles & Xie 2023)."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.blocks import Block, GeluMLP
from dig_jax.models.mixers import SoftmaxAttention


class DiT(DiffusionTransformer):
    """DiT with adaLN-Zero blocks; its blocks are all alike and stacked with a period of 1."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        def make_block(position: int, rngs: nnx.Rngs) -> Block:
            del position
            mixer = SoftmaxAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)
            mlp = GeluMLP(hidden_size, dtype=dtype, rngs=rngs)
            return Block(hidden_size, mixer=mixer, mlp=mlp, dtype=dtype, rngs=rngs)

        super().__init__(make_block, hidden_size=hidden_size, period=1, dtype=dtype, rngs=rngs, **options)
