"""The block that DiG and DiT share, its parts, and the final layer (DiG, section 3.3; DiT, section 3.2)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.models.layers import FusedLinear, Linear, xavier
from dig_jax.parallel import BATCH_AXES, constrain, constrain_batch, constrain_tokens, convolve_with_halo

EPSILON = 1e-6


def modulate(
    x: Float[Array, "b t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b t d"]:
    """x·(1 + scale) + shift, with one shift and scale per image."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Norm(nnx.Module):
    """LayerNorm without affine parameters ("layer") or RMSNorm with a weight ("rms"), in float32."""

    def __init__(self, width: int, kind: str = "layer"):
        self.weight = nnx.Param(jnp.ones(width)) if kind == "rms" else None

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Normalises each token; the result has the dtype of x."""
        y = x.astype(jnp.float32)
        if self.weight is None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
        return (y if self.weight is None else y * self.weight[...]).astype(x.dtype)


class Modulation(nnx.Module):
    """`count` vectors per image from Linear(SiLU(c)), zero at the start (adaLN-Zero)."""

    def __init__(self, width: int, count: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.count = count
        zeros = nnx.initializers.zeros_init()
        self.linear = Linear(width, count * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, c: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        """Gives the vectors in the order shift, scale, gate, shift, …"""
        vectors = constrain(self.linear(jax.nn.silu(c)), BATCH_AXES, "tensor")
        return jnp.split(constrain_batch(vectors), self.count, axis=-1)


class SwiGLU(nnx.Module):
    """down(SiLU(gate)·up) without biases; one fused projection, the gate's half first (Shazeer 2020)."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = 256 * -(-int(8 / 3 * width) // 256)
        options = {"use_bias": False, "kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.gate_up = FusedLinear(width, hidden, 2, **options)
        self.down = Linear(hidden, width, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies the same map to every token."""
        gate, up = self.gate_up(x)
        return self.down(constrain_tokens(jax.nn.silu(gate) * up, "tensor"))


class GeluMLP(nnx.Module):
    """Linear-GELU(tanh)-Linear with a hidden width of 4×."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.hidden = Linear(width, 4 * width, **options)
        self.out = Linear(4 * width, width, **options)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Applies the same map to every token."""
        return self.out(constrain_tokens(jax.nn.gelu(self.hidden(x), approximate=True), "tensor"))


@jax.custom_jvp
def depthwise_conv3x3(
    kernel: Float[Array, "3 3 d"], x: Float[Array, "b height width d"]
) -> Float[Array, "b height width d"]:
    """Depthwise 3×3 convolution, zero-padded, as nine shifted products that fuse into one pass over x."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(x[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3))


@depthwise_conv3x3.defjvp
def _depthwise_conv3x3_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Chooses what reverse mode transposes.

    Of the shifted products, the transpose in x is nine padded arrays that every consumer adds up again; of
    the grouped convolution, the transpose in the kernel is a full convolution on some platforms.
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
    """Depthwise 3×3 convolution with bias over the token grid; starts as the identity."""

    def __init__(self, width: int, *, dtype: DTypeLike):
        self.dtype = dtype
        self.kernel = nnx.Param(jnp.zeros((3, 3, width)).at[1, 1].set(1.0))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
        """Convolves tokens that stand in raster order on a grid of (rows, columns)."""
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        y = convolve_with_halo(depthwise_conv3x3, kernel, x.reshape(x.shape[0], *grid, -1))
        return y.reshape(x.shape) + bias


class Block(nnx.Module):
    """x += gate₁·mixer(modulate(norm(x))); x += gate₂·mlp(modulate(norm(x))); then the convolution.

    Args:
        mixer, mlp: the two branches; the mixer takes (x, grid).
        conv: "after" puts the depthwise convolution at the end of the block with no residual around it,
            "inside" between modulate and the mixer, None leaves it out.
        norm: "layer" or "rms".
    """

    def __init__(
        self,
        width: int,
        *,
        mixer: nnx.Module,
        mlp: nnx.Module,
        conv: str | None = None,
        norm: str = "layer",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.mixer, self.mlp = mixer, mlp
        self.norm1, self.norm2 = Norm(width, norm), Norm(width, norm)
        self.modulation = Modulation(width, 6, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(width, dtype=dtype) if conv else None
        self.conv_inside = conv == "inside"

    def __call__(
        self, x: Float[Array, "b t d"], c: Float[Array, "b d"], grid: tuple[int, int]
    ) -> Float[Array, "b t d"]:
        """Transforms tokens x under the condition c."""
        x = constrain_tokens(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        y = modulate(self.norm1(x), shift1, scale1)
        if self.conv is not None and self.conv_inside:
            y = self.conv(y, grid)
        x = x + gate1[:, None] * constrain_tokens(self.mixer(y, grid))
        x = x + gate2[:, None] * constrain_tokens(self.mlp(modulate(self.norm2(x), shift2, scale2)))
        if self.conv is not None and not self.conv_inside:
            x = self.conv(x, grid)
        return x


class FinalLayer(nnx.Module):
    """Norm, modulation by c (when there are classes) and a linear map to the patch; zero at the start."""

    def __init__(self, width: int, out_size: int, *, modulated: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = Norm(width)
        self.modulation = Modulation(width, 2, dtype=dtype, rngs=rngs) if modulated else None
        zeros = nnx.initializers.zeros_init()
        self.linear = Linear(width, out_size, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Float[Array, "b t patch"]:
        """Gives each token's patch, (row, column, channel)."""
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *self.modulation(c))
        return self.linear(x)
