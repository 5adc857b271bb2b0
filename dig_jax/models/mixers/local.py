"""Local attention: every token attends to a window around it (neighborhood attention, Hassani et al. 2023).

Windows are cut at the border of the image. The queries of a tile of tokens share the keys of the tile and its
surroundings, of which a mask leaves each query its window. So the cost is linear in the number of tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dig_jax.models.layers import FusedLinear, Linear, xavier
from dig_jax.models.mixers.heads import split_heads
from dig_jax.models.packing import per_image
from dig_jax.parallel import local_grid, shard_map_rows


class LocalAttention(nnx.Module):
    """Multi-head self-attention with biases inside windows.

    Args:
        window: rows and columns of a window, an odd number.

    Attributes:
        isolated: let every token attend to itself only, so that the output of a head is its v.
    """

    def __init__(self, width: int, *, num_heads: int, window: int, dtype: DTypeLike, rngs: nnx.Rngs):
        if width % num_heads:
            raise ValueError(f"invalid num_heads={num_heads}; expected a divisor of hidden_size={width}")
        self.num_heads, self.window, self.isolated = num_heads, window, False
        options = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.qkv_proj = FusedLinear(width, width, 3, **options)
        self.o_proj = Linear(width, width, **options)

    @per_image
    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
        """Mix tokens in raster order on a grid of (rows, columns)."""
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv_proj(x))
        attend = functools.partial(attend_locally, grid=local_grid(grid), window=self.window)
        o = v if self.isolated else shard_map_rows(attend, q, k, v)
        return self.o_proj(o.reshape(x.shape))


def attend_locally(
    q: Float[Array, "b own h k"],
    k: Float[Array, "b own h k"],
    v: Float[Array, "b own h k"],
    *,
    grid: tuple[int, int],
    window: int,
    axis_name: str | None = None,
) -> Float[Array, "b own h k"]:
    """Attend from every token to the tokens at most window // 2 rows and columns away.

    Args:
        q, k, v: this device's rows of the image, in raster order.
        grid: (rows, columns) of this device.
        window: an odd number.
        axis_name: mesh axis over which the rows of the image are sharded.
    """
    (rows, columns), reach = grid, window // 2
    tile = max(reach, 4)
    tiles = -(-rows // tile), -(-columns // tile)
    first_row, image_rows = 0, rows
    if axis_name is not None:
        k, v = (jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (k, v))
        first_row = jax.lax.axis_index(axis_name) * rows
        image_rows = k.shape[1] // columns
    b, _, heads, size = q.shape
    padding = (tiles[0] * tile - rows, tiles[1] * tile - columns)
    q = jnp.pad(
        q.reshape(b, rows, columns, heads, size), ((0, 0), *((0, p) for p in padding), (0, 0), (0, 0))
    )

    def surrounded(x: Array) -> Array:
        """Return this device's rows of an image with `reach` more tokens on all sides, and the padding."""
        x = x.reshape(b, image_rows, columns, heads, size)
        x = jnp.pad(x, ((0, 0), *((reach, reach + p) for p in padding), (0, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(x, first_row, tiles[0] * tile + 2 * reach, axis=1)

    query_rows, query_columns = (jnp.arange(tile) + tile * jnp.arange(n)[:, None] for n in tiles)
    key_rows, key_columns = (
        jnp.arange(tile + 2 * reach) + tile * jnp.arange(n)[:, None] - reach for n in tiles
    )
    near_rows = _near(query_rows, key_rows, reach) & _inside(key_rows + first_row, image_rows)
    near_columns = _near(query_columns, key_columns, reach) & _inside(key_columns, columns)
    # [rows and columns of tiles, query row and column, key row and column]
    mask = near_rows[:, None, :, None, :, None] & near_columns[None, :, None, :, None, :]
    mask = mask.reshape(tiles[0] * tiles[1], 1, tile**2, (tile + 2 * reach) ** 2)

    def cut(x: Array, side: int) -> Array:
        """Cut overlapping squares around the tiles: [b, tiles, side², h, k]."""
        x = jnp.stack([x[:, i * tile : i * tile + side] for i in range(tiles[0])], axis=1)
        x = jnp.stack([x[:, :, :, j * tile : j * tile + side] for j in range(tiles[1])], axis=2)
        return x.reshape(b, tiles[0] * tiles[1], side**2, heads, size)

    around = tile + 2 * reach
    attention = jax.vmap(functools.partial(jax.nn.dot_product_attention, mask=mask))
    o = attention(cut(q, tile), cut(surrounded(k), around), cut(surrounded(v), around))
    o = o.reshape(b, *tiles, tile, tile, heads, size).swapaxes(2, 3)
    o = o.reshape(b, tiles[0] * tile, tiles[1] * tile, heads, size)[:, :rows, :columns]
    return o.reshape(b, rows * columns, heads, size)


def _near(
    queries: Int[Array, "tiles q"], keys: Int[Array, "tiles k"], reach: int
) -> Bool[Array, "tiles q k"]:
    return jnp.abs(queries[:, :, None] - keys[:, None, :]) <= reach


def _inside(keys: Int[Array, "tiles k"], count: int) -> Bool[Array, "tiles 1 k"]:
    return ((keys >= 0) & (keys < count))[:, None]
