"""Layers of the autoencoder, with the names of diffusers' `AutoencoderKL`."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

EPSILON = 1e-6
# Maximum number of attention scores in memory at once, per image: 64 MiB.
MAX_SCORES = 2**24

Moments = tuple[Float[Array, "n groups"], Float[Array, "n groups"]]


class Conv(nnx.Module):
    """A convolution with bias, by default 3×3 and zero-padded."""

    def __init__(self, size_in: int, size_out: int, size: int = 3, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, size_in, size_out)))
        self.bias = nnx.Param(jnp.zeros(size_out))
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "n height width c"], *, stride: int = 1, padding: str | tuple = "SAME"
    ) -> Float[Array, "n height_out width_out c_out"]:
        """Convolve in the layer's dtype."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            window_strides=(stride, stride),
            padding=padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group normalization over the image (Wu & He 2018), in float32."""

    def __init__(self, channels: int, groups: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.groups = groups

    def __call__(
        self, x: Float[Array, "n height width c"], moments: Moments | None = None
    ) -> Float[Array, "n height width c"]:
        """Normalize x in its dtype; if x is a part of an image, `moments` describe the entire image."""
        mean, variance = group_moments(x, self.groups) if moments is None else moments
        mean, variance = (
            m.repeat(x.shape[-1] // self.groups, axis=1)[:, None, None] for m in (mean, variance)
        )
        y = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + EPSILON)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def group_moments(x: Float[Array, "n height width c"], groups: int) -> Moments:
    """Return mean and variance of each group of channels over the image."""
    n, height, width, c = x.shape
    x = x.astype(jnp.float32).reshape(n, height, width, groups, c // groups)
    # Rows first: one float32 sum over all pixels would differ visibly from the sums over stripes.
    mean = x.mean((2, 4)).mean(1)
    return mean, jnp.square(x - mean[:, None, None, :, None]).mean((2, 4)).mean(1)


class ResnetBlock(nnx.Module):
    """Residual block, with a 1×1 convolution on the skip connection if the width changes."""

    def __init__(self, size_in: int, size_out: int, *, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1, self.norm2 = GroupNorm(size_in, groups), GroupNorm(size_out, groups)
        self.conv1 = Conv(size_in, size_out, dtype=dtype, rngs=rngs)
        self.conv2 = Conv(size_out, size_out, dtype=dtype, rngs=rngs)
        self.conv_shortcut = (
            None if size_in == size_out else Conv(size_in, size_out, 1, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height width c_out"]:
        """Return x + conv2(SiLU(norm2(conv1(SiLU(norm1(x))))))."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(jax.nn.silu(self.norm2(h)))

    def shortcut(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height width c_out"]:
        """Return the skip connection."""
        return x if self.conv_shortcut is None else self.conv_shortcut(x)


class Attention(nnx.Module):
    """Residual single-head attention over all pixels, in chunks of queries to bound memory."""

    def __init__(self, channels: int, *, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nnx.Linear(channels, channels, dtype=dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height width c"]:
        """Return x plus its attention."""
        n, height, width, c = x.shape
        tokens = self.group_norm(x).reshape(n, -1, 1, c)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        chunk = largest_divisor(height * width, MAX_SCORES // (height * width))
        q = jnp.moveaxis(q.reshape(n, -1, chunk, 1, c), 1, 0)
        y = jax.lax.map(lambda queries: jax.nn.dot_product_attention(queries, k, v), q)
        return x + self.to_out(jnp.moveaxis(y, 0, 1).reshape(x.shape))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is at most `limit`, but at least 1."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)


class Downsample(nnx.Module):
    """Downsampling by 2: a convolution with stride 2, padded at the bottom and the right only."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height_out width_out c"]:
        """Halve height and width."""
        return self.conv(x, stride=2, padding=((0, 1), (0, 1)))


class Upsample(nnx.Module):
    """Upsampling by 2: nearest neighbors, then a convolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height_out width_out c"]:
        """Double height and width."""
        return self.conv(doubled(x))


def doubled(x: Float[Array, "n height width c"]) -> Float[Array, "n height_out width_out c"]:
    """Repeat each pixel in a 2×2 square."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
