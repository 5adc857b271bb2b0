"""What the GPU kernels share: how programs split a scan, its tiles in memory, arithmetic on them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_gla.scan import Scan
from pallas_gla.triton import call

LOG2_E = 1.4426950408889634
# The most entries of a state for which a chunk is summed by products.
LARGEST_STATE = 64 * 64


@dataclasses.dataclass(frozen=True)
class TritonTiling:
    """How programs share a scan: each takes one head, and one of `parts` parts of its chunks."""

    scan: Scan
    batch: int
    tokens: int
    heads: int
    keys: int
    values: int
    chunk: int
    parts: int
    dtype: jnp.dtype
    segmented: bool

    @property
    def programs(self) -> int:
        """Programs of a launch."""
        return self.batch * self.parts * self.heads

    @property
    def chunks(self) -> int:
        """Chunks of the scan."""
        return -(-self.tokens // self.chunk)

    @property
    def part_chunks(self) -> int:
        """Chunks of a part; the last one may have fewer."""
        return -(-self.chunks // self.parts)

    @property
    def key_width(self) -> int:
        """K, padded to a power of two."""
        return 1 << (self.keys - 1).bit_length()

    @property
    def value_width(self) -> int:
        """V, padded to a power of two."""
        return 1 << (self.values - 1).bit_length()

    @property
    def exact(self) -> bool:
        """Whether the chip's approximate instructions are out of the question."""
        return self.dtype == jnp.float32 or self.scan.interpret

    @property
    def by_products(self) -> bool:
        """Whether sums along a chunk are products with marks, not scans, which take twice the instructions.

        That takes tiles as large as a state, for which a large one leaves no registers, and gives 16 bits.
        """
        return self.dtype != jnp.float32 and self.key_width * self.value_width <= LARGEST_STATE

    def operand(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """A tile as the tensor cores take it.

        bfloat16 has the range that the factors of a decay need, which float16 has not.
        """
        return x.astype(jnp.float32 if self.dtype == jnp.float32 else jnp.bfloat16)

    def dot(
        self, x: Float[Array, "_ _"], y: Float[Array, "_ _"], contract: tuple[int, int] = (1, 0)
    ) -> Float[Array, "m n"]:
        """A matrix product over these axes, added up in float32; for float32 it takes three TF32 products."""
        precision = None
        if self.dtype == jnp.float32:
            x3 = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
            precision = lax.Precision.HIGHEST if self.scan.interpret else x3
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(
            self.operand(x), self.operand(y), dimensions, precision, preferred_element_type=jnp.float32
        )

    def sums(self, marks: Float[Array, "m c"], x: Float[Array, "c n"]) -> Float[Array, "m n"]:
        """Sums of rows of x, times marks of -1, 0 or 1: exact of bfloat16, of others by 16 bits of each."""
        marks = marks.astype(jnp.bfloat16)
        if x.dtype == jnp.bfloat16:
            return self.dot(marks, x)
        x = x.astype(jnp.float32)
        # By its bits: a cast to bfloat16 and back may be simplified away.
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
        high = lax.bitcast_convert_type(bits, jnp.float32)
        return self.dot(marks, high) + self.dot(marks, x - high)

    def sum_before(self, x: Float[Array, "c n"]) -> Float[Array, "c n"]:
        """For every token the sum over those before it."""
        if not self.by_products:
            return jnp.cumsum(x, axis=0) - x
        return self.sums(jnp.where(iota((x.shape[0],) * 2, 0) > iota((x.shape[0],) * 2, 1), 1.0, 0.0), x)

    def sum_values(self, x: Float[Array, "v k"]) -> Float[Array, "_ k"]:
        """The sum over the values of a state, in one row or in one for every token of a chunk."""
        if not self.by_products:
            return jnp.sum(x, axis=0)[None, :]
        return self.sums(jnp.ones((self.chunk, x.shape[0]), jnp.float32), x)

    def exp2(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """2**x, zero below 2**-126: numbers smaller than that would take three more instructions each."""
        return jnp.exp2(x) if self.scan.interpret else call.approximate("ex2", x)

    def times_exp2(self, x: Float[Array, "m n"], exponent: Float[Array, "_ n"]) -> Float[Array, "m n"]:
        """x * 2**exponent, of float32 numbers."""
        return x * jnp.exp2(exponent) if self.scan.interpret else call.times_exp2(x, exponent)

    def widen(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """What `operand` returned, in float32."""
        narrow = x.dtype == jnp.bfloat16 and not self.scan.interpret
        return call.widen(x) if narrow else x.astype(jnp.float32)

    def sigmoid(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Of a float32; accurate where it is small too, which a tanh would not be."""
        denominator = 1 + self.exp2(x * -LOG2_E)
        return 1 / denominator if self.exact else call.approximate("rcp", denominator)

    def log2_decay(self, g: Float[Array, "..."]) -> Float[Array, "..."]:
        """Base-2 logarithm of the decay, of log decays or, in a gated scan, of logits."""
        g = g.astype(jnp.float32)
        if self.scan.gating is None:
            return g * LOG2_E
        e = self.exp2(jnp.abs(g) * -LOG2_E)
        log2 = jnp.log1p(e) * LOG2_E if self.exact else call.approximate("lg2", 1 + e)
        return (jnp.minimum(g, 0) * LOG2_E - log2) * (1 / self.scan.gating.normalizer)


def iota(shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
    """Indices along an axis; int32 whatever jax_enable_x64 says."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def divide(x: Int[Array, "..."], n: int) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Quotient and remainder of int32 numbers >= 0."""
    if n & (n - 1) == 0:
        # As shifts, through which the compiler sees what neighbouring tokens share.
        return lax.shift_right_logical(x, lax.full_like(x, n.bit_length() - 1)), x & (n - 1)
    quotient = lax.div(x, lax.full_like(x, n))
    return quotient, x - quotient * n


def pick(x: Float[Array, "c n"], row: Any) -> Float[Array, " n"]:
    """One row of a tile, which Triton cannot slice, in float32."""
    return jnp.sum(jnp.where(iota(x.shape, 0) == row, x.astype(jnp.float32), 0.0), axis=0)


@dataclasses.dataclass(frozen=True)
class TritonProgram:
    """The running program: its head, its part of the scan, its batch element, and what it finds in memory.

    Arrays of tokens come as [B * T * H, width], states as [rows, K] or [rows, V]; `position` counts tokens in
    the order of the scan.
    """

    tiling: TritonTiling
    refs: dict[str, Any]
    head: Int[Array, ""]
    part: Int[Array, ""]
    element: Int[Array, ""]

    @classmethod
    def current(cls, tiling: TritonTiling, refs: dict[str, Any]) -> "TritonProgram":
        """Heads vary fastest, so that programs that run at once share cache lines."""
        rest, head = divide(call.program_id(0), tiling.heads)
        element, part = divide(rest, tiling.parts)
        return cls(tiling, refs, head, part, element)

    def positions(self, chunk: Int[Array, ""]) -> Int[Array, " c"]:
        """Positions of a chunk's tokens, which may pass the end of the scan."""
        return chunk * self.tiling.chunk + iota((self.tiling.chunk,), 0)

    def inside(self, positions: Int[Array, " c"]) -> Bool[Array, " c"] | None:
        """Which positions are before the end; None if all are."""
        tiling = self.tiling
        return None if tiling.tokens % tiling.chunk == 0 else positions < tiling.tokens

    def _rows(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        scan, tokens = self.tiling.scan, self.tiling.tokens
        token = tokens - 1 - position if scan.reverse else position
        if scan.by_columns and min(scan.grid) > 1:
            column, row = divide(token, scan.grid[0])
            token = row * scan.grid[1] + column
        return (self.element * tokens + token) * self.tiling.heads + self.head

    def _tile(
        self, name: str, positions: Int[Array, " c"]
    ) -> tuple[Any, tuple[Int[Array, "..."], ...], Bool[Array, "..."] | None]:
        ref, inside = self.refs[name], self.inside(positions)
        width = ref.shape[1]
        columns = iota((1, 1 << (width - 1).bit_length()), 1)
        rows = self._rows(positions)
        if inside is not None:
            # Not even the places that a masked store leaves alone may repeat others.
            rows = jnp.where(inside, rows, ref.shape[0])
        mask = None if inside is None else inside[:, None]
        if width != columns.size:
            mask = columns < width if mask is None else mask & (columns < width)
        rows = rows[:, None]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (rows.size, columns.size))
        return ref, (rows, columns), mask

    def load(self, name: str, positions: Int[Array, " c"]) -> Shaped[Array, "c n"]:
        """A tile [tokens, padded width]; zeros beyond the array."""
        return call.load(*self._tile(name, positions))

    def store(self, name: str, positions: Int[Array, " c"], x: Float[Array, "c n"]) -> None:
        """Writes a tile."""
        ref, index, mask = self._tile(name, positions)
        call.store(ref, index, x, mask)

    def _line(
        self, name: str, row: Int[Array, ""]
    ) -> tuple[Any, tuple[Int[Array, "..."], ...], Bool[Array, "..."] | None]:
        ref = self.refs[name]
        width = ref.shape[1]
        columns = iota((1 << (width - 1).bit_length(),), 0)
        return (
            ref,
            (lax.full_like(columns, 0) + row, columns),
            None if width == columns.size else columns < width,
        )

    def load_token(self, name: str, position: Int[Array, ""]) -> Float[Array, " n"]:
        """One token, in float32."""
        return call.load(*self._line(name, self._rows(position))).astype(jnp.float32)

    def store_token(self, name: str, position: Int[Array, ""], x: Float[Array, " n"]) -> None:
        """Writes one token."""
        ref, index, mask = self._line(name, self._rows(position))
        call.store(ref, index, x, mask)

    def load_line(self, name: str, row: Int[Array, ""]) -> Float[Array, " n"]:
        """A row of any array, in float32."""
        return call.load(*self._line(name, row)).astype(jnp.float32)

    def store_line(self, name: str, row: Int[Array, ""], x: Float[Array, " n"]) -> None:
        """Writes a row of any array."""
        ref, index, mask = self._line(name, row)
        call.store(ref, index, x, mask)

    def number(self, part: Int[Array, ""]) -> Int[Array, ""]:
        """The number of the program with another part of this head's scan."""
        tiling = self.tiling
        return (self.element * tiling.parts + part) * tiling.heads + self.head

    def _state(
        self, row: Int[Array, ""], column: Any, transposed: bool
    ) -> tuple[tuple[Int[Array, "..."], ...], Bool[Array, "..."] | None]:
        tiling = self.tiling
        shape = (tiling.value_width, tiling.key_width)
        values, keys = iota((shape[0], 1), 0), iota((1, shape[1]), 1)
        mask = None
        if shape != (tiling.values, tiling.keys):
            mask = (values < tiling.values) & (keys < tiling.keys)
        return ((row + keys, column + values) if transposed else (row + values, column + keys)), mask

    def chunk_state(self, chunk: Int[Array, ""]) -> tuple[tuple[Int[Array, "..."], ...], Any]:
        """Where the state that enters a chunk is saved: in [B * N * V, H * K]."""
        tiling = self.tiling
        row = (self.element * tiling.chunks + chunk) * tiling.values
        return self._state(row, self.head * tiling.keys, False)

    def local_state(self, part: Int[Array, ""]) -> tuple[tuple[Int[Array, "..."], ...], Any]:
        """Where a part's own state is: in [programs * V, K]."""
        return self._state(self.number(part) * self.tiling.values, 0, False)

    def end_state(self) -> tuple[tuple[Int[Array, "..."], ...], Any]:
        """Where an initial or a final state is: in [B * H * K, V], transposed to what the kernels hold."""
        return self._state((self.element * self.tiling.heads + self.head) * self.tiling.keys, 0, True)

    def zero_state(self) -> Float[Array, "v k"]:
        """A state of zeros, [V, K] in float32."""
        return jnp.zeros((self.tiling.value_width, self.tiling.key_width), jnp.float32)

    def load_state(self, name: str, where: tuple[tuple[Int[Array, "..."], ...], Any]) -> Float[Array, "v k"]:
        """A state from one of the places above."""
        return call.load(self.refs[name], *where)

    def store_state(
        self, name: str, where: tuple[tuple[Int[Array, "..."], ...], Any], x: Float[Array, "v k"]
    ) -> None:
        """Writes a state."""
        index, mask = where
        call.store(self.refs[name], index, x, mask)

    def store_end_state(self, name: str, x: Float[Array, "v k"], part: int) -> None:
        """Writes an initial or a final state, in the program of that part only."""

        def store() -> None:
            self.store_state(name, self.end_state(), x)

        if self.tiling.parts == 1:
            store()
        else:
            lax.cond(self.part == part, store, lambda: None)

    def store_part(self, state: Float[Array, "v k"], log2_decay: Float[Array, " k"]) -> None:
        """Writes what this part makes of a zero state, and the factor by which any other passes through."""
        size = self.tiling.part_chunks * self.tiling.chunk
        decay = self.tiling.exp2(log2_decay)
        if self.tiling.segmented:
            passes = self.run(self.part * size - 1) == self.run(self.part * size + size - 1)
            decay = jnp.where(passes, decay, 0.0)
        self.store_state("local_state", self.local_state(self.part), state)
        self.store_line("local_decay", self.number(self.part), decay)

    def through_part(self, part: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
        """A state on the other side of a part, by what `store_part` wrote."""
        decay = self.load_line("local_decay", self.number(part))
        return state * decay[None, :] + self.load_state("local_state", self.local_state(part))

    def run(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        """The number of the segment of a position, clipped into the scan, in scan order."""
        position = jnp.clip(position, 0, self.tiling.tokens - 1)
        return call.load(self.refs["runs"], (self.element * self.tiling.tokens + position,), None)

    def loop(self, body: Callable, carry: Any, backward: bool = False) -> Any:
        """Runs `carry = body(chunk, carry)` over the chunks of this part."""
        tiling = self.tiling
        first, count = self.part * tiling.part_chunks, tiling.part_chunks
        if tiling.chunks % tiling.parts:
            count = jnp.minimum(tiling.part_chunks, tiling.chunks - first)

        def step(i: Int[Array, ""], carry: Any) -> Any:
            return body(first + count - 1 - i if backward else first + i, carry)

        return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)
