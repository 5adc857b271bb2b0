"""Mamba in both directions, the token mixer of DiS (Gu & Dao 2023; Fei et al. 2024)."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from pallas_gla.selective_scan import selective_scan

from dig_jax.models.layers import FusedLinear, Linear
from dig_jax.parallel import constrain_tokens, shard_map_channels

# PyTorch's default for linear maps and convolutions: uniform in ±1/√fan_in.
pytorch_default = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_EXPANSION = 2  # channels of the scan per channel of a token
_STATES = 16  # per channel
_TAPS = 4  # of the convolution
_STEPS = (1e-3, 0.1)  # range of the initial step sizes


class BidirectionalMamba(nnx.Module):
    """Two Mamba scans over a sequence, from its first token and from its last, with shared projections.

    x and the output gate z: width → 2·width each. Each direction convolves x along the tokens that it has
    seen, computes step sizes and the maps B and C from the result, and scans. The outputs are added.

    Args:
        depth: number of blocks of the network, which scales the initial output projection.
    """

    def __init__(self, width: int, *, depth: int, dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"use_bias": False, "dtype": dtype, "rngs": rngs}
        inner = _EXPANSION * width
        self.in_proj = FusedLinear(width, inner, 2, kernel_init=pytorch_default, **options)
        self.forward = _Direction(width, reverse=False, dtype=dtype, rngs=rngs)
        self.backward = _Direction(width, reverse=True, dtype=dtype, rngs=rngs)
        scaled = nnx.initializers.variance_scaling(1 / (3 * depth), "fan_in", "uniform")
        self.out_proj = Linear(inner, width, kernel_init=scaled, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Mix the tokens of a sequence."""
        x, z = (constrain_tokens(y, "tensor") for y in self.in_proj(x))
        return self.out_proj(self.forward(x, z) + self.backward(x, z))


class _Direction(nnx.Module):
    """Convolution, step sizes, maps and the selective scan in one direction."""

    def __init__(self, width: int, *, reverse: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        inner, self.rank, self.reverse = _EXPANSION * width, math.ceil(width / 16), reverse
        options = {"dtype": dtype, "rngs": rngs}
        self.conv = CausalConv(inner, reverse=reverse, **options)
        self.x_proj = Linear(
            inner, self.rank + 2 * _STATES, use_bias=False, kernel_init=pytorch_default, **options
        )
        self.dt_proj = Linear(
            self.rank, inner, kernel_init=pytorch_default, bias_init=_inverse_softplus_of_steps, **options
        )
        rates = jnp.broadcast_to(jnp.log(jnp.arange(1.0, _STATES + 1)), (inner, _STATES))
        self.A_log = nnx.Param(rates)
        self.D = nnx.Param(jnp.ones(inner))

    def __call__(self, x: Float[Array, "b t d"], z: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Scan x and gate the result with SiLU(z)."""
        x = jax.nn.silu(self.conv(x))
        dt, b, c = jnp.split(self.x_proj(x), [self.rank, self.rank + _STATES], axis=-1)
        scan = functools.partial(selective_scan, reverse=self.reverse)
        return shard_map_channels(
            scan,
            # In the dtype of activations, like every operand: half the bytes.
            (x, jax.nn.softplus(self.dt_proj(dt)), -jnp.exp(self.A_log[...]), b, c, self.D[...], z),
            ("tokens", "tokens", "matrix", "maps", "maps", "vector", "tokens"),
        )


class CausalConv(nnx.Module):
    """Depthwise convolution with bias over a token and the three before it, or after it if reversed."""

    def __init__(self, width: int, *, reverse: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.reverse, self.dtype = reverse, dtype
        bound = _TAPS**-0.5

        def uniform(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.kernel, self.bias = uniform(_TAPS, width), uniform(width)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Convolve; tokens outside the sequence are zero. The kernel's last entry is the token's own."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        tokens, past = x.shape[1], _TAPS - 1
        padded = jnp.pad(x, ((0, 0), (0, past) if self.reverse else (past, 0), (0, 0)))
        starts = reversed(range(_TAPS)) if self.reverse else range(_TAPS)
        return bias + sum(padded[:, s : s + tokens] * kernel[i] for i, s in enumerate(starts))


def _inverse_softplus_of_steps(key: Array, shape: tuple[int, ...], dtype: DTypeLike, **_) -> Array:
    """Return biases whose softplus is log-uniform in the range of step sizes (Mamba's released code)."""
    low, high = (math.log(step) for step in _STEPS)
    steps = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return steps + jnp.log(-jnp.expm1(-steps))
