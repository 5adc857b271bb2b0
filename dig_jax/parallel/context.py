"""Tokens split over the mesh axis `context`, in raster order and so by rows: what mixes them exchanges here.

Everything else is the partitioner's. It splits neither kernels nor a collective that is not its own, so these
run for each device's own images, rows and heads.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dig_jax.parallel.constraints import Axes, axis_sizes, constrain, fitting
from dig_jax.parallel.mesh import BATCH_AXES

CONTEXT = "context"
_ROWS: Sequence[Axes] = (BATCH_AXES, CONTEXT, None, None)
_HEADS: Sequence[Axes] = (BATCH_AXES, CONTEXT, "tensor", None)


def context_size() -> int:
    """How many devices share the tokens of an image."""
    return axis_sizes().get(CONTEXT, 1)


def constrain_rows(x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
    """Images, split into rows too."""
    return constrain(x, *_ROWS)


def constrain_tokens(x: Float[Array, "b t d"], channels: Axes = None) -> Float[Array, "b t d"]:
    """x, split into images, rows, and over the axes that split its channels."""
    return constrain(x, BATCH_AXES, CONTEXT, channels)


def constrain_heads(x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    """x, split into images, rows and heads."""
    return constrain(x, *_HEADS)


def local_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a device's part of a grid."""
    return grid[0] // context_size(), grid[1]


def shard_map_rows(function: Callable, *arrays: Float[Array, "..."]) -> Float[Array, "b t h v"]:
    """`function`, which mixes tokens, called on each device's rows.

    Args:
        function: (*arrays, axis_name) → [b, t, h, v], where `axis_name` is the mesh axis over which rows are
            split, or None where they are not.
        arrays: tokens by heads, [b, t, h, …], and what is for all of them.
    """
    if context_size() == 1:
        return function(*arrays, axis_name=None)
    axes = [_HEADS if x.ndim == 4 else () for x in arrays]
    return _on_parts(functools.partial(function, axis_name=CONTEXT), arrays, axes, _HEADS)


def convolve_with_halo(
    convolve: Callable[[Array, Array], Array],
    kernel: Float[Array, "3 3 d"],
    x: Float[Array, "b height width d"],
) -> Float[Array, "b height width d"]:
    """A zero-padded 3×3 convolution, given the row above and the row below each device's rows."""
    size = context_size()
    if size == 1:
        return convolve(kernel, x)
    down, up = ([(i, i + step) for i in range(size) if 0 <= i + step < size] for step in (1, -1))

    def shard_map_rows(x: Array, kernel: Array) -> Array:
        # Where there is no such row ppermute gives zeros, which is the padding.
        above = jax.lax.ppermute(x[:, -1:], CONTEXT, down)
        below = jax.lax.ppermute(x[:, :1], CONTEXT, up)
        return convolve(kernel, jnp.concatenate([above, x, below], axis=1))[:, 1:-1]

    return _on_parts(shard_map_rows, [x, kernel], [_ROWS, ()], _ROWS)


def _on_parts(
    function: Callable, arrays: Sequence[Array], axes: Sequence[Sequence[Axes]], out_axes: Sequence[Axes]
) -> Array:
    """`function` called on each device's parts; the result has the shape of the first array."""
    sizes = axis_sizes()
    in_specs = tuple(fitting(x.shape, names, sizes) for x, names in zip(arrays, axes, strict=True))
    out_specs = fitting(arrays[0].shape, out_axes, sizes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)(*arrays)
