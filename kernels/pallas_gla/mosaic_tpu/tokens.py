"""A grid step's block of tokens, chunk by chunk in the order of the scan.

No order moves a token in HBM. Along rows a chunk is some neighbouring rows of a [tokens, lanes] block, and a
reversed scan takes blocks and chunks from the last to the first. Along columns the block is some whole
columns of the image, [1, rows, columns, lanes]. What is read of it is copied into tiles of 128 lanes,
[rows * columns, 128], in VMEM, where a column is every n-th row. 16-bit numbers lie there in pairs of columns
as 32-bit words, of which a column is one half. What is written is turned as a whole, from
[columns * rows, lanes].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

# Rows of a tile in HBM: blocks of columns are a multiple of it.
SUBLANES = 8
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Chunks of [tokens, lanes] in the order of the scan."""

    ref: Any
    chunk: int

    def load(self, chunk: int | Int[Array, ""], lanes: slice, dtype: Any = None) -> Float[Array, "c w"]:
        """The tokens of a chunk, in `dtype` or their own."""
        x = self.ref[self._rows(chunk), lanes]
        return x if dtype is None else x.astype(dtype)

    def store(self, chunk: int | Int[Array, ""], lanes: slice, x: Float[Array, "c w"]) -> None:
        """Writes the tokens of a chunk."""
        self.ref[self._rows(chunk), lanes] = x.astype(self.ref.dtype)

    def _rows(self, chunk: int | Int[Array, ""]) -> pl.Slice:
        start = chunk * self.chunk
        return pl.ds(start if isinstance(chunk, int) else pl.multiple_of(start, self.chunk), self.chunk)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Chunks of whole columns; `words` holds tiles of 128 lanes below each other."""

    words: Any
    chunk: int
    rows: int
    columns: int
    dtype: Any

    @staticmethod
    def words_of(rows: int, columns: int, lanes: int, dtype: Any) -> tuple[tuple[int, int], Any]:
        """Shape and dtype of `words`."""
        packed = 4 // dtype.itemsize
        shape = (-(-lanes // LANES) * rows * columns // packed, LANES)
        return shape, jnp.float32 if packed == 1 else jnp.int32

    def fill(self, block: Any) -> None:
        """Copies a block, [1, rows, columns, lanes], into `words`."""
        lanes = block.shape[-1]
        view = block.reshape(self.rows * self.columns, lanes)
        view = view.bitcast(jnp.int32) if self._packed else view
        height = view.shape[0]
        for tile in range(-(-lanes // LANES)):
            width = min(LANES, lanes - tile * LANES)
            self.words[pl.ds(tile * height, height), :width] = view[:, tile * LANES : tile * LANES + width]

    def load(self, chunk: int | Int[Array, ""], lanes: slice, dtype: Any = None) -> Float[Array, "c w"]:
        """The tokens of a chunk, in `dtype` or their own."""
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
    """Fills `block`, [1, rows, columns, lanes], from `tokens`, [columns * rows, lanes]."""
    _, rows, columns, width = block.shape
    for start in range(0, width, LANES):
        lanes = slice(start, min(start + LANES, width))
        block[0, :, :, lanes] = jnp.swapaxes(tokens[:, lanes].reshape(columns, rows, -1), 0, 1)


def column_chunk(grid: tuple[int, int], preferred: int, smallest: int) -> int | None:
    """The chunk of whole columns, of `smallest` to 128 tokens, nearest to `preferred`; None if there is none.

    Columns are a multiple of 16 tokens high, and there are a multiple of 8 of them.
    """
    rows, columns = grid
    if rows % (2 * SUBLANES) or columns % SUBLANES:
        return None
    sizes = [c for c in range(rows, 129, rows) if c >= smallest and SUBLANES * rows % c == 0]
    return min(sizes, key=lambda c: abs(c - preferred), default=None)
