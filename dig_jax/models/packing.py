"""Several images of any sizes as one sequence of tokens: image after image, each in raster order.

Per-token layers see one long sequence. A scan follows each image in its own order, with a new segment where
an image begins, which resets the state; a column scan needs the tokens of each image reordered, because the
columns of several images do not follow each other in any common grid. Convolutions and attention run image
by image.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dig_jax.parallel import context_size


@dataclasses.dataclass(frozen=True)
class PackedGrids:
    """The grids of the images in a sequence.

    Attributes:
        grids: (rows, columns) of each image.
    """

    grids: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> list[int]:
        """Number of tokens of each image."""
        return [rows * columns for rows, columns in self.grids]

    @property
    def segment_ids(self) -> Int32[np.ndarray, " t"]:
        """The index of each token's image."""
        return np.repeat(np.arange(len(self.grids), dtype=np.int32), self.sizes)

    @property
    def by_columns(self) -> Int32[np.ndarray, " t"]:
        """The order that visits each image column by column, as indices of tokens."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        orders = [
            start + np.arange(rows * columns).reshape(rows, columns).T.ravel()
            for start, (rows, columns) in zip(starts, self.grids, strict=True)
        ]
        return np.concatenate(orders).astype(np.int32)

    def split(self, x: Float[Array, "b t d"]) -> Iterator[tuple[Float[Array, "b _t d"], tuple[int, int]]]:
        """Yield the tokens and the grid of each image."""
        parts = jnp.split(x, np.cumsum(self.sizes[:-1]), axis=1)
        yield from zip(parts, self.grids, strict=True)


Grid = tuple[int, int] | PackedGrids
"""(rows, columns) of tokens in raster order, or the grids of several images in one sequence."""


def check_packable(packable: bool, images: Sequence[Array], t: Array) -> None:
    """Check the arguments of `DiffusionTransformer.packed`.

    Args:
        packable: whether the model supports packing.
        images: as there.
        t: as there.

    Raises:
        ValueError: the model or the mesh does not support packing, or t does not match the images.
    """
    if not packable:
        raise ValueError(
            "unsupported packed images of this model; expected DiG without skip_alignment='upstream', or DiT"
            " without class tokens"
        )
    if context_size() > 1:
        raise ValueError(
            f"unsupported packed images with {context_size()} devices along mesh axis context; expected 1"
        )
    if not images or t.shape != (len(images[0]), len(images)):
        raise ValueError(
            f"numbers of timesteps and images differ: got t of shape {t.shape} for {len(images)} images per"
            " sequence; expected [sequences, images]"
        )


def per_image(function: Callable[..., Array]) -> Callable[..., Array]:
    """Make a method (x [b, t, d], (rows, columns)) → [b, t, d] take packed images too, one by one."""

    @functools.wraps(function)
    def call(self: object, x: Array, grid: Grid) -> Array:
        if not isinstance(grid, PackedGrids):
            return function(self, x, grid)
        return jnp.concatenate([function(self, part, own) for part, own in grid.split(x)], axis=1)

    return call


def per_token(vectors: Array, grid: Grid) -> Float[Array, "b t d"]:
    """Return the vector of each token: [b, 1, d] from one per image [b, d], or from packed ones [b, n, d]."""
    return vectors[:, grid.segment_ids] if isinstance(grid, PackedGrids) else vectors[:, None]
