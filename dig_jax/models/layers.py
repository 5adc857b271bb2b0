"""Layers of all models: linear maps, normalization, modulation, MLPs and the depthwise convolution."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.models.packing import per_image
from dig_jax.parallel import (
    BATCH_AXES,
    axis_sizes,
    constrain,
    constrain_batch,
    constrain_tokens,
    context_size,
    convolve_with_halo,
)

EPSILON = 1e-6
NormKind = Literal["layer", "rms"]
xavier = nnx.initializers.xavier_uniform()


class Linear(nnx.Linear):
    """`nnx.Linear` over flattened tokens.

    With one contracted axis instead of two, XLA's CPU backend folds the transposed operand of the weight
    gradient into the product instead of copying it together with everything fused into the copy. A train
    step became 1.4 times as fast.
    """

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x·kernel + bias."""
        if context_size() > 1:  # rows are sharded; a flattened axis would gather them
            return super().__call__(x)
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class FusedLinear(Linear):
    """`count` linear maps of one input to the same width, computed as one product.

    The kernel holds the columns of the first map, then the columns of the second, and so on.
    """

    def __init__(self, size_in: int, size_out: int, count: int, **options):
        super().__init__(size_in, count * size_out, **options)
        self.count = count

    def __call__(self, x: Float[Array, "*batch in"]) -> list[Float[Array, "*batch out"]]:
        """Return the output of each map."""
        if "tensor" not in axis_sizes():
            return jnp.split(super().__call__(x), self.count, axis=-1)
        # Shard the columns within each map, so that splitting the result moves no tokens.
        kernel = self.kernel[...].astype(self.dtype).reshape(x.shape[-1], self.count, -1)
        y = jnp.einsum("...i,imo->...mo", x, constrain(kernel, None, None, "tensor"))
        if self.bias is not None:
            y += self.bias[...].astype(self.dtype).reshape(self.count, -1)
        return [y[..., index, :] for index in range(self.count)]


class Norm(nnx.Module):
    """LayerNorm without affine parameters ("layer") or RMSNorm with a weight ("rms"), in float32."""

    def __init__(self, width: int, kind: NormKind = "layer", epsilon: float = EPSILON):
        self.epsilon = epsilon
        self.weight = nnx.Param(jnp.ones(width)) if kind == "rms" else None

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalize the last axis; the result has the dtype of x."""
        y = x.astype(jnp.float32)
        if self.weight is None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y if self.weight is None else y * self.weight[...]).astype(x.dtype)


def modulate(
    x: Float[Array, "b t d"], shift: Float[Array, " b #t d"], scale: Float[Array, " b #t d"]
) -> Float[Array, "b t d"]:
    """Return x·(1 + scale) + shift, with one shift and scale per image or per token."""
    return x * (1 + scale) + shift


class Modulation(nnx.Module):
    """`count` vectors per image from Linear(SiLU(c)), initialized to zero (adaLN-Zero)."""

    def __init__(self, width: int, count: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.count = count
        zeros = nnx.initializers.zeros_init()
        self.linear = Linear(width, count * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, c: Float[Array, "b *n d"]) -> list[Float[Array, "b *n d"]]:
        """Return the vectors in the order shift, scale, gate, shift, …"""
        vectors = constrain(self.linear(jax.nn.silu(c)), BATCH_AXES, *[None] * (c.ndim - 2), "tensor")
        return jnp.split(constrain_batch(vectors), self.count, axis=-1)


class SwiGLU(nnx.Module):
    """down(SiLU(gate)·up) (Shazeer 2020); one fused projection, gate half first."""

    def __init__(self, width: int, *, hidden: int, use_bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"use_bias": use_bias, "kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.gate_up = FusedLinear(width, hidden, 2, **options)
        self.down = Linear(hidden, width, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Apply the MLP to each token."""
        gate, up = self.gate_up(x)
        return self.down(constrain_tokens(jax.nn.silu(gate) * up, "tensor"))


class GeluMLP(nnx.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, *, hidden: int, dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.hidden = Linear(width, hidden, **options)
        self.out = Linear(hidden, width, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Apply the MLP to each token."""
        return self.out(constrain_tokens(jax.nn.gelu(self.hidden(x), approximate=True), "tensor"))


@jax.custom_jvp
def depthwise_conv3x3(
    kernel: Float[Array, "3 3 d"], x: Float[Array, "b height width d"]
) -> Float[Array, "b height width d"]:
    """Apply a zero-padded depthwise 3×3 convolution, as nine shifted products that fuse into one pass."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    products = (x[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3))
    return sum(products, start=jnp.zeros((), x.dtype))


@depthwise_conv3x3.defjvp
def _depthwise_conv3x3_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Linearize in the form whose transpose is cheap: a grouped convolution in x, shifted products in kernel.

    Transposed in x, the shifted products would become nine padded arrays that each consumer adds up again.
    Transposed in the kernel, a grouped convolution becomes a full convolution on some platforms.
    """
    (kernel, x), (kernel_dot, x_dot) = primals, tangents
    along_x = jax.lax.conv_general_dilated(
        x_dot,
        kernel[:, :, None],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return depthwise_conv3x3(kernel, x), along_x + depthwise_conv3x3(kernel_dot, x)


class DepthwiseConv(nnx.Module):
    """Depthwise 3×3 convolution with bias over the token grid, initialized to the identity."""

    def __init__(self, width: int, *, dtype: DTypeLike):
        self.dtype = dtype
        self.kernel = nnx.Param(jnp.zeros((3, 3, width)).at[1, 1].set(1.0))
        self.bias = nnx.Param(jnp.zeros(width))

    @per_image
    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
        """Convolve tokens in raster order on a grid of (rows, columns)."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        y = convolve_with_halo(depthwise_conv3x3, kernel, x.reshape(x.shape[0], *grid, -1))
        return y.reshape(x.shape) + bias
