"""Gated linear attention, the token mixer of DiG."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from pallas_gla import gated_gla_2d

from dig_jax.models.layers import Linear
from dig_jax.models.mixers.heads import split_heads
from dig_jax.parallel import local_grid, shard_map_rows

# GLA initializes its projections with gain 2^-2.5 (Yang et al. 2023): Xavier-uniform, variance times 2^-5.
_xavier_small = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")


class GatedLinearAttention(nnx.Module):
    """GLA over a grid of tokens in one scan direction (Yang et al. 2023, section 4; DiG, section 3.3).

    q, k: width → width/2; v and output gate: width → width; decay logits: width → 16 → width/2;
    log-decay = logsigmoid(logits)/16. Only the decay has a bias.

    Args:
        direction: "row", "row_reversed", "column" or "column_reversed", as in `gated_gla_2d`.
        implementation: backend of `pallas_gla`; None selects the best available one.
    """

    decay_rank = 16

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        direction: str,
        implementation: str | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if width % (2 * num_heads):
            raise ValueError(
                f"invalid num_heads={num_heads}; expected a divisor of the key width {width / 2:g}"
                f" (half of hidden_size={width})"
            )
        self.num_heads, self.direction, self.implementation = num_heads, direction, implementation

        def linear(size_in: int, size_out: int, use_bias: bool = False) -> Linear:
            return Linear(
                size_in, size_out, use_bias=use_bias, kernel_init=_xavier_small, dtype=dtype, rngs=rngs
            )

        self.q_proj = linear(width, width // 2)
        self.k_proj = linear(width, width // 2)
        self.v_proj = linear(width, width)
        self.gate_proj = linear(width, width)
        self.decay_down = linear(width, self.decay_rank)
        self.decay_up = linear(self.decay_rank, width // 2, use_bias=True)
        self.norm_weight = nnx.Param(jnp.ones(width // num_heads))
        self.o_proj = linear(width, width)

    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
        """Mix tokens in raster order on a grid of (rows, columns)."""

        def heads(y: Array) -> Array:
            return split_heads(_flat(y), self.num_heads)

        core = functools.partial(
            gated_gla_2d,
            grid=local_grid(grid),
            direction=self.direction,
            implementation=self.implementation,
        )
        o = shard_map_rows(
            core,
            heads(self.q_proj(x)),
            heads(self.k_proj(x)),
            heads(self.v_proj(x)),
            heads(self.decay_up(self.decay_down(x))),
            heads(self.gate_proj(x)),
            self.norm_weight[...],
        )
        return self.o_proj(_flat(o.reshape(x.shape)))


def _flat(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Keep the compiler from splitting the channels into heads before this point.

    Otherwise the TPU compiler splits them inside the projection, pads each head to 128 lanes and then copies
    the result for the kernel: a fifth of the memory traffic of a DiG-XL step.
    """
    return jax.lax.optimization_barrier(x)
