"""Resizing as in the programs that published scores come from, and checks of images."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def check_images(images: jax.Array) -> None:
    """Check that images are RGB pixels of a supported dtype.

    Raises:
        ValueError: they are not.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"invalid images of shape {list(images.shape)}; expected [n, height, width, 3]")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"invalid images of dtype {images.dtype}; expected uint8, or float in 0…255")


def resize_tf1(images: Float[Array, "n height width c"], size: int) -> Float[Array, "n size size c"]:
    """Resize to size × size like TensorFlow 1's bilinear `resize_images`, which FID's graph contains.

    Output pixel i is read at i · height / size, without the half-pixel offset of today's libraries, from two
    rows, and from two columns, at any scale: there is no anti-aliasing. The computation is in float32.
    """
    for axis in (2, 1):
        length = images.shape[axis]
        position = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = position.astype(np.int32)
        high = np.minimum(low + 1, length - 1)
        fraction = (position - low).reshape([-1 if d == axis else 1 for d in range(4)])
        below, above = jnp.take(images, low, axis=axis), jnp.take(images, high, axis=axis)
        images = below + (above - below) * fraction
    return images


def resize_bicubic(images: Float[Array, "n height width c"], size: int) -> Float[Array, "n size size c"]:
    """Resize to size × size like PyTorch's anti-aliased `bicubic`, with Keys's kernel of a = -0.5."""
    n, _, _, c = images.shape
    return jax.image.resize(images, (n, size, size, c), "cubic")


def resize_pillow(images: Float[Array, "n height width c"], size: int) -> Float[Array, "n size size c"]:
    """Resize pixels in 0…255 to size × size like Pillow's `BICUBIC`.

    The kernel is that of `resize_bicubic`, but Pillow rounds pixels to integers after resizing rows and again
    after resizing columns. Its weights have 22 bits, so that a pixel in a million may differ by one.
    """
    n, height, _, c = images.shape
    for shape in ((n, height, size, c), (n, size, size, c)):
        images = jnp.clip(jnp.floor(jax.image.resize(images, shape, "cubic") + 0.5), 0, 255)
    return images
