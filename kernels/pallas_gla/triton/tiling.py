"""How programs share a scan on a GPU, how they address memory, and arithmetic on tiles."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Bool, Float, Int, Shaped

from pallas_gla.scan import Scan
from pallas_gla.triton import call

LOG2_E = 1.4426950408889634
# The smallest tile of a tensor core.
SHORTEST_CHUNK = 16
# The most entries in a padded state for which sums along a chunk are matrix products.
LARGEST_STATE = 64 * 64


@dataclasses.dataclass(frozen=True)
class TritonTiling:
    """How programs share a scan: each runs a part of one head, of `part_chunks` chunks except in the last."""

    scan: Scan
    batch: int
    tokens: int
    heads: int
    keys: int
    values: int
    chunk: int
    part_chunks: int
    dtype: jnp.dtype
    segmented: bool
    registers: int | None = None
    shared_operands: bool = False

    @property
    def programs(self) -> int:
        """Number of programs in a launch."""
        return self.batch * self.parts * self.heads

    @property
    def chunks(self) -> int:
        """Number of chunks in the scan."""
        return -(-self.tokens // self.chunk)

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.chunks // self.part_chunks)

    def of_chunks(self, chunk: int) -> "TritonTiling":
        """Return the same parts in shorter chunks."""
        return dataclasses.replace(self, chunk=chunk, part_chunks=self.part_chunks * self.chunk // chunk)

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
        """Whether to avoid the GPU's approximate instructions."""
        return self.dtype == jnp.float32 or self.scan.interpret

    @property
    def by_products(self) -> bool:
        """Whether sums along a chunk are matrix products; scans take twice as many instructions.

        Products are accurate to 16 bits and need tiles as large as a state, so they suit small states only.
        """
        return self.dtype != jnp.float32 and self.key_width * self.value_width <= LARGEST_STATE

    def operand(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """Convert a tile to an operand of the tensor cores.

        This is bfloat16 even for float16 inputs, which lacks the range that decay factors need.
        """
        return x.astype(jnp.float32 if self.dtype == jnp.float32 else jnp.bfloat16)

    def dot(
        self, x: Float[Array, "_ _"], y: Float[Array, "_ _"], contract: tuple[int, int] = (1, 0)
    ) -> Float[Array, "m n"]:
        """Multiply over the given axes, accumulating in float32. float32 takes three TF32 products."""
        precision = None
        if self.dtype == jnp.float32:
            x3 = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
            precision = lax.Precision.HIGHEST if self.scan.interpret else x3
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(
            self.operand(x), self.operand(y), dimensions, precision, preferred_element_type=jnp.float32
        )

    def sums(self, marks: Float[Array, "m c"], x: Float[Array, "c n"], parts: int = 2) -> Float[Array, "m n"]:
        """Sum rows of x times marks of -1, 0 or 1, in bfloat16 products of `parts` parts of x.

        Three parts have all bits of a float32; with two, sums are accurate to 16 bits.
        """
        marks = marks.astype(jnp.bfloat16)
        if x.dtype == jnp.bfloat16:
            return _product(marks, x)
        return functools.reduce(operator.add, (_product(marks, part) for part in _parts(x, parts)))

    def sum_before(self, x: Float[Array, "c n"]) -> Float[Array, "c n"]:
        """Return, for every token, the sum over all tokens before it."""
        if not self.by_products:
            return jnp.cumsum(x, axis=0) - x
        return self.sums(jnp.where(iota((x.shape[0],) * 2, 0) > iota((x.shape[0],) * 2, 1), 1.0, 0.0), x, 3)

    def sum_values(self, x: Float[Array, "v k"]) -> Float[Array, "_ k"]:
        """Sum a state over its values, into one row or one row per token of a chunk."""
        if not self.by_products:
            return jnp.sum(x, axis=0)[None, :]
        return self.sums(jnp.ones((self.chunk, x.shape[0]), jnp.float32), x, 3)

    def sum_tokens(self, x: Float[Array, "c v"]) -> Float[Array, "v _"]:
        """Sum a tile over its tokens, into one column or 16 equal ones."""
        if not self.by_products:
            return jnp.sum(x, axis=0)[:, None]
        ones = jnp.ones((x.shape[0], 16), jnp.bfloat16)
        return functools.reduce(operator.add, (_product(part, ones, 0) for part in _parts(x, 2)))

    def fixed(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """Return x, which is then computed and stored to shared memory once, if products read it there.

        XLA moves a transpose of an operand to the loads behind it, so that Triton would compute a tile twice
        that other products use as it is. It moves none through tiles that were joined and split.
        """
        return jnp.unstack(jnp.stack([x, x], axis=-1), axis=-1)[0] if self.shared_operands else x

    def exp2(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return 2**x, or zero below 2**-126, because denormals take three more instructions each."""
        return jnp.exp2(x) if self.scan.interpret else call.approximate("ex2", x)

    def times_exp2(self, x: Float[Array, "m n"], exponent: Float[Array, "_ n"]) -> Float[Array, "m n"]:
        """Return x * 2**exponent in float32."""
        return x * jnp.exp2(exponent) if self.scan.interpret else call.times_exp2(x, exponent)

    def widen(self, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """Convert a result of `operand` back to float32."""
        narrow = x.dtype == jnp.bfloat16 and not self.scan.interpret
        return call.widen(x) if narrow else x.astype(jnp.float32)

    def sigmoid(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the logistic function of a float32. Unlike a tanh, it is accurate for small results."""
        denominator = 1 + self.exp2(x * -LOG2_E)
        return 1 / denominator if self.exact else call.approximate("rcp", denominator)

    def log2_decay(self, g: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the base-2 logarithm of the decay, given the log decay or, in a gated scan, its logits."""
        g = g.astype(jnp.float32)
        if self.scan.gating is None:
            return g * LOG2_E
        e = self.exp2(jnp.abs(g) * -LOG2_E)
        log2 = jnp.log1p(e) * LOG2_E if self.exact else call.approximate("lg2", 1 + e)
        return (jnp.minimum(g, 0) * LOG2_E - log2) * (1 / self.scan.gating.normalizer)


def _parts(x: Float[Array, "m n"], count: int) -> Iterator[BFloat16[Array, "m n"]]:
    """Yield tiles of bfloat16 whose sum is x, to 8 bits each."""
    x = x.astype(jnp.float32)
    for _ in range(count - 1):
        # Truncate by bits, because the compiler may remove a cast to bfloat16 and back.
        bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
        part = lax.bitcast_convert_type(bits, jnp.float32)
        yield part.astype(jnp.bfloat16)
        x = x - part
    yield x.astype(jnp.bfloat16)


def _product(x: BFloat16[Array, "_ _"], y: BFloat16[Array, "c n"], axis: int = 1) -> Float[Array, "m n"]:
    return lax.dot_general(x, y, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], axis: int) -> Int[Array, "..."]:
    """Return indices along an axis, int32 even with jax_enable_x64."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def divide(x: Int[Array, "..."], n: int) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Return quotient and remainder of int32 numbers >= 0."""
    if n & (n - 1) == 0:
        # Shifts show the compiler that neighboring tokens have a constant distance in memory.
        return lax.shift_right_logical(x, lax.full_like(x, n.bit_length() - 1)), x & (n - 1)
    quotient = lax.div(x, lax.full_like(x, n))
    return quotient, x - quotient * n


def pick(x: Float[Array, "c n"], row: Any) -> Float[Array, " n"]:
    """Return one row of a tile in float32; Triton cannot slice tiles."""
    return jnp.sum(jnp.where(iota(x.shape, 0) == row, x.astype(jnp.float32), 0.0), axis=0)


@dataclasses.dataclass(frozen=True)
class TritonProgram:
    """The running program: its head, its part of the scan, its batch element, and its arrays by name.

    Arrays of tokens are [B * T * H, width], arrays of states [rows, K] or [rows, V]. A position counts tokens
    in scan order.
    """

    tiling: TritonTiling
    refs: dict[str, Any]
    head: Int[Array, ""]
    part: Int[Array, ""]
    element: Int[Array, ""]

    @classmethod
    def current(cls, tiling: TritonTiling, refs: dict[str, Any]) -> "TritonProgram":
        """Return the running program. Heads vary fastest, so that concurrent programs share cache lines."""
        rest, head = divide(call.limit_registers(call.program_id(0), tiling.registers), tiling.heads)
        element, part = divide(rest, tiling.parts)
        return cls(tiling, refs, head, part, element)

    def positions(self, chunk: Int[Array, ""]) -> Int[Array, " c"]:
        """Return the positions of a chunk's tokens; some may be beyond the end of the scan."""
        return chunk * self.tiling.chunk + iota((self.tiling.chunk,), 0)

    def of_chunks(self, chunk: int) -> "TritonProgram":
        """Return the program with the same part in shorter chunks."""
        return dataclasses.replace(self, tiling=self.tiling.of_chunks(chunk))

    def inside(self, positions: Int[Array, " c"]) -> Bool[Array, " c"] | None:
        """Return which positions are inside the scan, or None if all are."""
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
            # Even masked-out indices of a store must be distinct.
            rows = jnp.where(inside, rows, ref.shape[0])
        mask = None if inside is None else inside[:, None]
        if width != columns.size:
            mask = columns < width if mask is None else mask & (columns < width)
        rows = rows[:, None]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (rows.size, columns.size))
        return ref, (rows, columns), mask

    def load(self, name: str, positions: Int[Array, " c"]) -> Shaped[Array, "c n"]:
        """Load a tile, [tokens, padded width], with zeros beyond the array."""
        return call.load(*self._tile(name, positions))

    def store(
        self,
        name: str,
        positions: Int[Array, " c"],
        x: Float[Array, "c n"],
    ) -> None:
        """Store a tile."""
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
        """Load one token in float32."""
        return call.load(*self._line(name, self._rows(position))).astype(jnp.float32)

    def store_token(self, name: str, position: Int[Array, ""], x: Float[Array, " n"]) -> None:
        """Store one token."""
        ref, index, mask = self._line(name, self._rows(position))
        call.store(ref, index, x, mask)

    def load_line(self, name: str, row: Int[Array, ""]) -> Float[Array, " n"]:
        """Load a row of any array in float32."""
        return call.load(*self._line(name, row)).astype(jnp.float32)

    def store_line(self, name: str, row: Int[Array, ""], x: Float[Array, " n"]) -> None:
        """Store a row of any array."""
        ref, index, mask = self._line(name, row)
        call.store(ref, index, x, mask)

    def program_index(self, part: Int[Array, ""]) -> Int[Array, ""]:
        """Return the index of the program that runs a part of this head's scan."""
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
        """Return the index of the state that enters a chunk, in [B * N * V, H * K]."""
        tiling = self.tiling
        row = (self.element * tiling.chunks + chunk) * tiling.values
        return self._state(row, self.head * tiling.keys, False)

    def local_state(self, part: Int[Array, ""]) -> tuple[tuple[Int[Array, "..."], ...], Any]:
        """Return the index of a part's local state, in [programs * V, K]."""
        return self._state(self.program_index(part) * self.tiling.values, 0, False)

    def end_state(self) -> tuple[tuple[Int[Array, "..."], ...], Any]:
        """Return the index of an initial or final state, in [B * H * K, V], which is transposed."""
        return self._state((self.element * self.tiling.heads + self.head) * self.tiling.keys, 0, True)

    def zero_state(self) -> Float[Array, "v k"]:
        """Return a state of zeros, [V, K] in float32."""
        return jnp.zeros((self.tiling.value_width, self.tiling.key_width), jnp.float32)

    def load_state(self, name: str, where: tuple[tuple[Int[Array, "..."], ...], Any]) -> Float[Array, "v k"]:
        """Load a state at one of the indices above."""
        return call.load(self.refs[name], *where)

    def store_state(
        self, name: str, where: tuple[tuple[Int[Array, "..."], ...], Any], x: Float[Array, "v k"]
    ) -> None:
        """Store a state."""
        index, mask = where
        call.store(self.refs[name], index, x, mask)

    def store_end_state(self, name: str, x: Float[Array, "v k"], part: int) -> None:
        """Store an initial or final state, in the program of the given part only."""

        def store() -> None:
            self.store_state(name, self.end_state(), x)

        if self.tiling.parts == 1:
            store()
        else:
            lax.cond(self.part == part, store, lambda: None)

    def store_part(self, state: Float[Array, "v k"], log2_decay: Float[Array, "_ k"]) -> None:
        """Store this part's final state from zero, and the factor by which it decays an initial state.

        Args:
            log2_decay: the total decay of the part in bits, in equal rows.
        """
        size = self.tiling.part_chunks * self.tiling.chunk
        decay = self.tiling.exp2(jnp.max(log2_decay, axis=0))
        if self.tiling.segmented:
            passes = self.segment(self.part * size - 1) == self.segment(self.part * size + size - 1)
            decay = jnp.where(passes, decay, 0.0)
        self.store_state("local_state", self.local_state(self.part), state)
        self.store_line("local_decay", self.program_index(self.part), decay)

    def through_part(self, part: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
        """Return the state after a part, from what `store_part` stored."""
        decay = self.load_line("local_decay", self.program_index(part))
        # A NaN must not pass a decay of zero, which stands for a new segment.
        state = jnp.where(decay[None, :] > 0, state * decay[None, :], 0.0)
        return state + self.load_state("local_state", self.local_state(part))

    def segment(self, position: Int[Array, "..."]) -> Int[Array, "..."]:
        """Return the segment number of a position, which is clipped to the scan."""
        position = jnp.clip(position, 0, self.tiling.tokens - 1)
        return call.load(self.refs["segments"], (self.element * self.tiling.tokens + position,), None)

    def loop(self, body: Callable, carry: Any, backward: bool = False) -> Any:
        """Run `carry = body(chunk, carry)` over the chunks of this part."""
        tiling = self.tiling
        first, count = self.part * tiling.part_chunks, tiling.part_chunks
        if tiling.chunks % tiling.part_chunks:
            count = jnp.minimum(tiling.part_chunks, tiling.chunks - first)

        def step(i: Int[Array, ""], carry: Any) -> Any:
            return body(first + count - 1 - i if backward else first + i, carry)

        return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)
