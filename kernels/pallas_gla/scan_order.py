"""Token order: the four directions of a grid, segment boundaries, and the state that starts a scan."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")


def to_scan_order(
    x: Shaped[Array, "b t *rest"], grid: tuple[int, int], direction: str
) -> Shaped[Array, "b t *rest"]:
    """Reorder tokens from raster order (row by row) to the order in which `direction` visits them."""
    if direction.startswith("column"):
        x = _transpose_grid(x, grid)
    return jnp.flip(x, axis=1) if direction.endswith("reversed") else x


def to_raster_order(
    x: Shaped[Array, "b t *rest"], grid: tuple[int, int], direction: str
) -> Shaped[Array, "b t *rest"]:
    """Reorder tokens from the order of `direction` to raster order; the inverse of `to_scan_order`."""
    if direction.endswith("reversed"):
        x = jnp.flip(x, axis=1)
    return _transpose_grid(x, (grid[1], grid[0])) if direction.startswith("column") else x


def _transpose_grid(x: Shaped[Array, "b t *rest"], grid: tuple[int, int]) -> Shaped[Array, "b t *rest"]:
    return x.reshape(x.shape[0], *grid, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)


def segment_starts(segment_ids: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """Return True where a token, in scan order, begins a new segment. The first token never does."""
    first = jnp.zeros_like(segment_ids[:, :1], bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def zero_state(
    k: Float[Array, "b t h k"], v: Float[Array, "b t h v"], g: Float[Array, "b t h k"]
) -> Float[Array, "b h k v"]:
    """Return a float32 state of zeros, computed from the inputs so that it has their sharding."""
    rows = jnp.zeros_like(k[:, 0], jnp.float32) + jnp.zeros_like(g[:, 0], jnp.float32)
    return rows[..., None] + jnp.zeros_like(v[:, 0], jnp.float32)[..., None, :]
