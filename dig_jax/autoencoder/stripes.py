"""The decoder in stripes of rows: the same image in the memory of a few of its activations.

A group norm needs the whole image before its first pixel is known, and attention all pixels for each, so the
image cannot be cut up once and for all. Instead each layer goes over it stripe by stripe: one pass gathers
the moments for the next norm; another reads stripes with a row more on either side, normalises and convolves
them, and stores what comes out. Sums around a residual block are made in place, and an up-sampled image is
never stored, but computed again for each of its readers. So two activations are alive at once; in the block
after an up-sampling three, of which the third still has the lower resolution.

What stands before the first up-sampling is small, and is computed as a whole.
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
    """An activation, read in windows: the rows of a stripe and one more on either side.

    The rows outside the image hold anything.

    stored: [n, 1 + height + 1, width, c], or None where the windows are computed.
    """

    window: Callable[[Stripe], Rows]
    stored: Array | None = None


def decode_in_stripes(
    decoder: Decoder, x: Float[Array, "n height width c"], stripes: int
) -> Float[Array, "n image_height image_width c_out"]:
    """As `decoder(x)`, up to rounding.

    Args:
        stripes: how many; a divisor of the height.
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
    in_place = image.stored is not None and block.conv_shortcut is None

    def first(stripe: Stripe) -> tuple[Rows, ...]:
        window = image.window(stripe)
        h = _conv(block.conv1, jax.nn.silu(block.norm1(window, moments1)), stripe, stripes)
        return (h,) if in_place else (h, block.shortcut(window[:, 1:-1]))

    shapes = jax.eval_shape(first, jnp.int32(0))
    buffers = [_blank(shape, moment, stripes) for shape, moment in zip(shapes, moments1, strict=False)]
    h, *shortcut = _replace_rows(lambda stripe, *_: first(stripe), buffers, stripes)
    h = _stored(h, stripes)
    moments2 = _moments(block.norm2, h, stripes)

    def second(stripe: Stripe, x: Rows) -> tuple[Rows]:
        y = jax.nn.silu(block.norm2(h.window(stripe), moments2))
        return (x + _conv(block.conv2, y, stripe, stripes),)

    return _stored(*_replace_rows(second, shortcut or [image.stored], stripes), stripes)


def _upsampled(layer: Upsample, image: _Image, stripes: int) -> _Image:
    return _Image(lambda stripe: _conv(layer.conv, doubled(image.window(stripe)), stripe, stripes, halo=2))


def _stored(array: Array, stripes: int) -> _Image:
    rows = (array.shape[1] - 2) // stripes
    return _Image(lambda stripe: jax.lax.dynamic_slice_in_dim(array, stripe * rows, rows + 2, axis=1), array)


def _blank(rows: jax.ShapeDtypeStruct, moment: Array, stripes: int) -> Array:
    """Room for stripes of such rows.

    It is filled with a number that nothing else is filled with: of equal constants XLA makes one, keeps it to
    the end, and copies it for each use.
    """
    n, height, width, c = rows.shape
    return jnp.full((n, 1 + stripes * height + 1, width, c), moment[0, 0], rows.dtype)


def _conv(layer: Conv, window: Rows, stripe: Stripe, stripes: int, halo: int = 1) -> Rows:
    """A 3×3 convolution of a window with `halo` rows on either side, of which one is used up."""
    rows = window.shape[1] - 2 * halo
    row = stripe * rows - halo + jnp.arange(window.shape[1])
    inside = (row >= 0) & (row < stripes * rows)
    return layer(jnp.where(inside[:, None, None], window, 0), padding=((0, 0), (1, 1)))


def _replace_rows(
    compute: Callable[..., tuple[Rows, ...]], buffers: list[Array], stripes: int
) -> list[Array]:
    """Replaces the rows of images, stripe by stripe and in place: (stripe, *rows) → rows."""

    def step(stripe: Stripe, buffers: list[Array]) -> list[Array]:
        counts = [(buffer.shape[1] - 2) // stripes for buffer in buffers]
        # XLA works in place where it reads and writes at one and the same index.
        starts = [1 + stripe * count for count in counts]
        old = [
            jax.lax.dynamic_slice_in_dim(*part, axis=1) for part in zip(buffers, starts, counts, strict=True)
        ]
        new = zip(buffers, compute(stripe, *old), starts, strict=True)
        return [jax.lax.dynamic_update_slice_in_dim(*part, axis=1) for part in new]

    return jax.lax.fori_loop(0, stripes, step, buffers)


def _moments(norm: GroupNorm, image: _Image, stripes: int) -> Moments:
    """Those of the whole image, by group."""

    def step(stripe: Stripe, moments: Moments) -> Moments:
        # Of so many stripes and one more, all of one size (Chan, Golub & LeVeque 1979).
        count, (mean, variance) = stripe.astype(jnp.float32), moments
        more_mean, more_variance = group_moments(image.window(stripe)[:, 1:-1], norm.groups)
        delta = more_mean - mean
        variance = (count * variance + more_variance + jnp.square(delta) * count / (count + 1)) / (count + 1)
        return mean + delta / (count + 1), variance

    n = jax.eval_shape(image.window, jnp.int32(0)).shape[0]
    return jax.lax.fori_loop(0, stripes, step, (jnp.zeros((n, norm.groups)),) * 2)
