"""Access to the tokens of a grid step, chunk by chunk in scan order.

No direction moves tokens in HBM. Along rows, a chunk is a range of rows of a [tokens, lanes] block, and a
reversed scan takes blocks and chunks last to first. Along columns, a block is some full columns of the
image, [1, rows, columns, lanes]. Inputs are copied into VMEM as tiles of 128 lanes, [rows * columns, 128],
where a column is every n-th row; two neighboring columns of 16-bit numbers share 32-bit words. Outputs are
collected as [columns * rows, lanes] and transposed at the end.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

# Rows of a tile in HBM. Blocks of columns are multiples of it.
SUBLANES = 8
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Chunks of a [tokens, lanes] block."""

    ref: Any
    chunk: int

    def load(self, chunk: int | Int[Array, ""], lanes: slice, dtype: Any = None) -> Float[Array, "c w"]:
        """Load the tokens of a chunk, by default in the dtype of the array."""
        x = self.ref[self._rows(chunk), lanes]
        return x if dtype is None else x.astype(dtype)

    def store(self, chunk: int | Int[Array, ""], lanes: slice, x: Float[Array, "c w"]) -> None:
        """Store the tokens of a chunk."""
        self.ref[self._rows(chunk), lanes] = x.astype(self.ref.dtype)

    def _rows(self, chunk: int | Int[Array, ""]) -> slice | pl.Slice:
        if isinstance(chunk, int):
            return pl.ds(chunk * self.chunk, self.chunk)
        return pl.ds(pl.multiple_of(chunk * self.chunk, self.chunk), self.chunk)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Chunks of full columns; `words` holds stacked tiles of 128 lanes."""

    words: Any
    chunk: int
    rows: int
    columns: int
    dtype: Any

    @staticmethod
    def words_of(rows: int, columns: int, lanes: int, dtype: Any) -> tuple[tuple[int, int], Any]:
        """Return the shape and dtype of `words`."""
        packed = 4 // dtype.itemsize
        shape = (-(-lanes // LANES) * rows * columns // packed, LANES)
        return shape, jnp.float32 if packed == 1 else jnp.int32

    def fill(self, block: Any) -> None:
        """Copy a block, [1, rows, columns, lanes], into `words`."""
        lanes = block.shape[-1]
        view = block.reshape(self.rows * self.columns, lanes)
        view = view.bitcast(jnp.int32) if self._packed else view
        height = view.shape[0]
        for tile in range(-(-lanes // LANES)):
            width = min(LANES, lanes - tile * LANES)
            self.words[pl.ds(tile * height, height), :width] = view[:, tile * LANES : tile * LANES + width]

    def load(self, chunk: int | Int[Array, ""], lanes: slice, dtype: Any = None) -> Float[Array, "c w"]:
        """Load the tokens of a chunk, by default in the dtype of the array."""
        together, first = self.chunk // self.rows, lanes.start // LANES
        tiles = [
            jnp.concatenate([self._column(tile, chunk * together + n) for n in range(together)])
            for tile in range(first, -(-lanes.stop // LANES))
        ]
        x = jnp.concatenate(tiles, axis=1)[:, lanes.start - first * LANES : lanes.stop - first * LANES]
        return x.astype(self.dtype if dtype is None else dtype)

    @property
    def _packed(self) -> bool:
        return self.dtype.itemsize == 2

    def _column(self, tile: int, column: int | Int[Array, ""]) -> Float[Array, "r w"]:
        stride = self.columns // 2 if self._packed else self.columns
        word = column >> 1 if self._packed else column
        words = self.words[pl.ds(tile * self.rows * stride + word, self.rows, stride), :]
        if not self._packed:
            return words
        # bfloat16 is the upper half of float32.
        even, odd = words << 16, words & jnp.int32(-(2**16))
        if isinstance(column, int):
            bits = odd if column & 1 else even
        else:
            bits = jnp.where((column & 1) == 1, odd, even)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


def by_rows(tokens: Any, block: Any) -> None:
    """Fill `block`, [1, rows, columns, lanes], from `tokens`, [columns * rows, lanes]."""
    _, rows, columns, width = block.shape
    for start in range(0, width, LANES):
        lanes = slice(start, min(start + LANES, width))
        block[0, :, :, lanes] = jnp.swapaxes(tokens[:, lanes].reshape(columns, rows, -1), 0, 1)


def column_chunk(grid: tuple[int, int], preferred: int, smallest: int) -> int | None:
    """Return the chunk size nearest to `preferred`, from `smallest` to 128, that holds full columns.

    Returns None if there is none, or unless rows are a multiple of 16 and columns a multiple of 8.
    """
    rows, columns = grid
    if rows % (2 * SUBLANES) or columns % SUBLANES:
        return None
    sizes = [c for c in range(rows, 129, rows) if c >= smallest and SUBLANES * rows % c == 0]
    return min(sizes, key=lambda c: abs(c - preferred), default=None)
