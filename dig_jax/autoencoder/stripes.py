"""Decoding in stripes of rows, which needs the memory of a few activations at full resolution.

A group norm needs statistics of the full image before its first pixel, and attention needs all pixels, so
the image cannot simply be cut into tiles. Instead each layer runs over the image stripe by stripe: a first
pass computes the statistics of the next norm; a second one reads stripes with one more row on either side,
normalizes and convolves them, and stores the result. Sums around a residual block are updated in place. An
upsampled image is never stored; each reader recomputes it. So two activations are in memory at once, and in
the block after an upsampling a third one at half the resolution.

The layers before the first upsampling are small and run on the full image.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dig_jax.autoencoder.layers import Conv, GroupNorm, Moments, ResnetBlock, Upsample, doubled, group_moments
from dig_jax.autoencoder.networks import Decoder

Stripe = Int[Array, ""]
Rows = Float[Array, "_ _ _ _"]


@dataclasses.dataclass(frozen=True)
class _Image:
    """An activation that is read in windows: the rows of a stripe and one more on either side.

    The values of rows outside the image are undefined.

    window: returns the window of a stripe.
    stored: [n, 1 + height + 1, width, c], or None if windows are computed.
    """

    window: Callable[[Stripe], Rows]
    stored: Array | None = None


def decode_in_stripes(
    decoder: Decoder, x: Float[Array, "n height width c"], stripes: int
) -> Float[Array, "n image_height image_width c_out"]:
    """Return `decoder(x)` up to rounding.

    Args:
        decoder: the decoder.
        x: latents.
        stripes: number of stripes, a divisor of the height.
    """
    x = decoder.mid_block(decoder.conv_in(x))
    image = _stored(jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))), stripes)
    for stage in decoder.up_blocks:
        for block in stage.resnets:
            image = _residual(block, image, stripes)
        if stage.resample is not None:
            image = _upsampled(stage.resample, image, stripes)
    moments = _moments(decoder.conv_norm_out, image, stripes)

    def last(stripe: Stripe) -> Rows:
        h = jax.nn.silu(decoder.conv_norm_out(image.window(stripe), moments))
        return _conv(decoder.conv_out, h, stripe, stripes)

    out = jnp.moveaxis(jax.lax.map(last, jnp.arange(stripes)), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])


def _residual(block: ResnetBlock, image: _Image, stripes: int) -> _Image:
    moments1 = _moments(block.norm1, image, stripes)
    in_place = image.stored if block.conv_shortcut is None else None

    def first(stripe: Stripe) -> tuple[Rows, ...]:
        window = image.window(stripe)
        h = _conv(block.conv1, jax.nn.silu(block.norm1(window, moments1)), stripe, stripes)
        return (h,) if in_place is not None else (h, block.shortcut(window[:, 1:-1]))

    shapes = jax.eval_shape(first, jnp.int32(0))
    buffers = [_blank(shape, moment, stripes) for shape, moment in zip(shapes, moments1, strict=False)]
    h, *shortcut = _replace_rows(lambda stripe, *_: first(stripe), buffers, stripes)
    h = _stored(h, stripes)
    moments2 = _moments(block.norm2, h, stripes)

    def second(stripe: Stripe, x: Rows) -> tuple[Rows]:
        y = jax.nn.silu(block.norm2(h.window(stripe), moments2))
        return (x + _conv(block.conv2, y, stripe, stripes),)

    (out,) = _replace_rows(second, shortcut if in_place is None else [in_place], stripes)
    return _stored(out, stripes)


def _upsampled(layer: Upsample, image: _Image, stripes: int) -> _Image:
    return _Image(lambda stripe: _conv(layer.conv, doubled(image.window(stripe)), stripe, stripes, halo=2))


def _stored(array: Array, stripes: int) -> _Image:
    rows = (array.shape[1] - 2) // stripes
    return _Image(lambda stripe: jax.lax.dynamic_slice_in_dim(array, stripe * rows, rows + 2, axis=1), array)


def _blank(rows: jax.ShapeDtypeStruct, moment: Array, stripes: int) -> Array:
    """Return a buffer for all stripes.

    Its value is unique to this buffer: XLA merges equal constants, keeps them alive to the end, and copies
    them for each use.
    """
    n, height, width, c = rows.shape
    return jnp.full((n, 1 + stripes * height + 1, width, c), moment[0, 0], rows.dtype)


def _conv(layer: Conv, window: Rows, stripe: Stripe, stripes: int, halo: int = 1) -> Rows:
    """Apply a 3×3 convolution to a window with `halo` rows on either side; the result has `halo - 1`."""
    rows = window.shape[1] - 2 * halo
    row = stripe * rows - halo + jnp.arange(window.shape[1])
    inside = (row >= 0) & (row < stripes * rows)
    return layer(jnp.where(inside[:, None, None], window, 0), padding=((0, 0), (1, 1)))


def _replace_rows(
    compute: Callable[..., tuple[Rows, ...]], buffers: list[Array], stripes: int
) -> list[Array]:
    """Replace the rows of images by `compute(stripe, *rows)`, stripe by stripe and in place."""

    def step(stripe: Stripe, buffers: list[Array]) -> list[Array]:
        counts = [(buffer.shape[1] - 2) // stripes for buffer in buffers]
        # XLA works in place only if reads and writes use the same index.
        starts = [1 + stripe * count for count in counts]
        old = [
            jax.lax.dynamic_slice_in_dim(*rows, axis=1) for rows in zip(buffers, starts, counts, strict=True)
        ]
        new = zip(buffers, compute(stripe, *old), starts, strict=True)
        return [jax.lax.dynamic_update_slice_in_dim(*rows, axis=1) for rows in new]

    return jax.lax.fori_loop(0, stripes, step, buffers)


def _moments(norm: GroupNorm, image: _Image, stripes: int) -> Moments:
    """Return mean and variance of each group over the full image."""

    def step(stripe: Stripe, moments: Moments) -> Moments:
        # Merge the moments of the first `stripe` stripes and of the next one (Chan, Golub & LeVeque 1979).
        count, (mean, variance) = stripe.astype(jnp.float32), moments
        more_mean, more_variance = group_moments(image.window(stripe)[:, 1:-1], norm.groups)
        delta = more_mean - mean
        variance = (count * variance + more_variance + jnp.square(delta) * count / (count + 1)) / (count + 1)
        return mean + delta / (count + 1), variance

    n = jax.eval_shape(image.window, jnp.int32(0)).shape[0]
    return jax.lax.fori_loop(0, stripes, step, (jnp.zeros((n, norm.groups)),) * 2)
