"""Softmax attention, the token mixer of DiT."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.models.layers import FusedLinear, Linear, xavier
from dig_jax.models.mixers.heads import split_heads
from dig_jax.parallel import shard_map_rows


class SoftmaxAttention(nnx.Module):
    """Multi-head self-attention with biases (Vaswani et al. 2017).

    Attributes:
        isolated: let every token attend to itself only, so that the output of a head is its v.
    """

    def __init__(self, width: int, *, num_heads: int, dtype: DTypeLike, rngs: nnx.Rngs):
        if width % num_heads:
            raise ValueError(f"invalid num_heads={num_heads}; expected a divisor of hidden_size={width}")
        self.num_heads, self.isolated = num_heads, False
        options = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.qkv_proj = FusedLinear(width, width, 3, **options)
        self.o_proj = Linear(width, width, **options)

    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
        """Let every token attend to all tokens; the grid has no effect."""
        del grid
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv_proj(x))
        o = v if self.isolated else shard_map_rows(_attend, q, k, v)
        return self.o_proj(o.reshape(x.shape))


def _attend(
    q: Float[Array, "b own h k"],
    k: Float[Array, "b own h k"],
    v: Float[Array, "b own h k"],
    axis_name: str | None,
) -> Float[Array, "b own h k"]:
    """Attend from this device's tokens to the tokens of all devices along a mesh axis."""
    if axis_name is not None:
        k, v = (jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation=_implementation(q))


def _implementation(q: Float[Array, "b own h k"]) -> Literal["cudnn"] | None:
    """Return "cudnn" where its flash attention runs, since JAX never selects it, or None for plain JAX.

    cuDNN asks the GPU itself, so a program that is compiled ahead of time without one gets plain JAX.
    """
    if jax.default_backend() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return None
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    # ROCm names its chips "gfx…".
    ampere = capability[:1].isdigit() and float(capability) >= 8
    return "cudnn" if ampere and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 else None
