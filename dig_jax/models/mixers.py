"""Token mixers: gated linear attention (linear time) and softmax attention (the DiT baseline)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from pallas_gla import gated_gla_2d

from dig_jax.models.layers import FusedLinear, Linear, xavier
from dig_jax.parallel import axis_sizes, constrain_heads, local_grid, shard_map_rows

# Gain 2^-2.5 of GLA's projections (Yang et al. 2023): a uniform Xavier with its variance times 2^-5.
_xavier_small = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")


class GatedLinearAttention(nnx.Module):
    """GLA over a grid of tokens in one scan direction (Yang et al. 2023, section 4; DiG, section 3.3).

    q, k: width → width/2; v and the output gate: width → width; the decay's logits go through 16
    channels; log-decay = logsigmoid(logits)/16. No biases but the decay's.
    """

    decay_rank = 16

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        direction: str,
        dtype: DTypeLike,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        if width % (2 * num_heads):
            raise ValueError(
                f"num_heads={num_heads} does not divide the key width {width / 2:g} (half of"
                f" hidden_size={width}) of gated linear attention"
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
        """Mixes tokens that stand in raster order on a grid of (rows, columns)."""

        def heads(y: Array) -> Array:
            return _split_heads(_flat(y), self.num_heads)

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


class SoftmaxAttention(nnx.Module):
    """Multi-head self-attention with biases (Vaswani et al. 2017); it has no use for the grid."""

    def __init__(self, width: int, num_heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide hidden_size={width}")
        self.num_heads = num_heads
        options = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.qkv_proj = FusedLinear(width, width, 3, **options)
        self.o_proj = Linear(width, width, **options)

    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
        """Mixes all tokens with all others."""
        del grid
        o = shard_map_rows(_attend, *(_split_heads(y, self.num_heads) for y in self.qkv_proj(x)))
        return self.o_proj(o.reshape(x.shape))


def _attend(
    q: Float[Array, "b part h k"],
    k: Float[Array, "b part h k"],
    v: Float[Array, "b part h k"],
    axis_name: str | None,
) -> Float[Array, "b part h k"]:
    """Attention of some tokens to those of all devices along a mesh axis."""
    if axis_name is not None:
        k, v = (jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v)


def _flat(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """x, which the compiler is to keep with its channels in one dimension, as the kernels take them.

    Else a TPU's makes heads of them within the projection, each padded to 128 lanes, and then a copy for the
    kernel: at XL's size a fifth of a step's memory traffic.
    """
    return jax.lax.optimization_barrier(x)


def _split_heads(x: Float[Array, "b t d"], num_heads: int) -> Float[Array, "b t h k"]:
    """Channels as heads, which the mesh axis `tensor` splits.

    Raises:
        ValueError: it does not divide their number.
    """
    devices = axis_sizes().get("tensor", 1)
    if num_heads % devices:
        raise ValueError(f"{num_heads} heads do not divide by the {devices} devices of mesh axis tensor")
    return constrain_heads(x.reshape(*x.shape[:2], num_heads, -1))
