"""Operations on one chunk that the GPU kernels share: decay, segments, masks and the recurrence."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.triton.tiling import LOG2_E, TritonProgram, TritonTiling, iota, pick

# Largest half of a chunk's decay, in bits, for which the factors relative to it, and sums of their products
# with keys and values, stay finite.
SPAN = 64.0
# The bits of an infinite float32.
INFINITE = 0x7F800000
# Largest half of a chunk's decay, in bits, in the channel that decays least, for which a running sum gives
# dg. If all channels decay strongly at a token, its dg is small, and errors of other tokens would hide it.
WEAK = 4.5


def chunk_decay(program: TritonProgram, positions: Int[Array, " c"]) -> tuple[Float[Array, "c k"], float]:
    """Return the decays of a chunk, zero beyond the end, and the factor that makes them base-2 logarithms."""
    tiling, g = program.tiling, program.load("g", positions)
    if tiling.scan.gating is None:
        return g, LOG2_E
    g, inside = tiling.log2_decay(g), program.inside(positions)
    # Rounding once to bfloat16 changes a decay by at most 0.1 % and halves the products in its sums.
    return tiling.operand(g if inside is None else jnp.where(inside[:, None], g, 0.0)), 1.0


@dataclasses.dataclass(frozen=True)
class Decay:
    """The decay inside a chunk, in base-2 logarithms, relative to half its total in every channel.

    relative: the decay until every token without that half, which falls from minus the half to the half.
    before, after: the half, in one row or in one row per value of a state. In float32 they have the rounding
        errors of `relative` at the first and the last token.
    """

    relative: Float[Array, "c k"]
    before: Float[Array, "_ k"]
    after: Float[Array, "_ k"]
    keys: int

    @classmethod
    def of(cls, program: TritonProgram, positions: Int[Array, " c"]) -> "Decay":
        """Return the decay of the chunk at these positions."""
        g, unit = chunk_decay(program, positions)
        relative, before, after = sums_from_half(program.tiling, g)
        return cls(relative * unit, before * unit, after * unit, program.tiling.keys)

    @classmethod
    def zero_total(cls, tiling: TritonTiling) -> Float[Array, "_ k"]:
        """Return `total` of no chunks."""
        return jnp.zeros((tiling.value_width if tiling.by_products else 1, tiling.key_width), jnp.float32)

    @property
    def total(self) -> Float[Array, "_ k"]:
        """The decay of the whole chunk, in the rows of `after`."""
        return self.before + self.after

    @property
    def largest(self) -> Float[Array, " c"]:
        """The largest magnitude of `relative` in every token."""
        return jnp.max(jnp.abs(self.relative), axis=1)

    @property
    def bounded(self) -> Bool[Array, ""]:
        """Whether the factors relative to the half are at most 2**SPAN."""
        return jnp.max(self.largest) <= SPAN

    @property
    def least(self) -> Float[Array, " n"]:
        """Half the total of the channel that decays least, in every row of `after`."""
        after = self.after
        if self.keys != after.shape[1]:
            after = jnp.where(iota(after.shape, 1) < self.keys, after, -jnp.inf)
        return jnp.max(after, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitness:
    """Whether the chunks so far fit the form in products, in one number per row of a tile.

    A sum over rows costs barriers, so that it comes after the last chunk.

    span: the largest magnitude of `Decay.relative`.
    weak: the strongest `Decay.least`.
    size: the largest magnitude of the tiles that must be finite, as bits.
    """

    span: Float[Array, " c"]
    weak: Float[Array, " n"] | None
    size: Int[Array, " m"] | None

    @classmethod
    def of(cls, tiling: TritonTiling, checked: int | None = None, weak: bool = False) -> "Fitness":
        """Return the fitness before the first chunk, whose checked tiles have this many rows."""
        rows = tiling.value_width if tiling.by_products else 1
        return cls(
            jnp.zeros((tiling.chunk,), jnp.float32),
            jnp.zeros((rows,), jnp.float32) if weak else None,
            None if checked is None else jnp.zeros((checked,), jnp.int32),
        )

    def after(self, decay: Decay, checked: Float[Array, "_ k"] | None = None) -> "Fitness":
        """Return the fitness after a chunk with this decay."""
        weak, size = self.weak, self.size
        if weak is not None:
            weak = jnp.minimum(weak, decay.least)
        if size is not None:
            assert checked is not None
            size = jnp.maximum(size, jnp.max(magnitude(checked), axis=1))
        return Fitness(jnp.maximum(self.span, decay.largest), weak, size)

    @property
    def bounded(self) -> Bool[Array, ""]:
        """Whether the factors of all chunks relative to half the total were at most 2**SPAN."""
        return jnp.max(self.span) <= SPAN

    def of_all(self, state: Float[Array, "v k"]) -> Bool[Array, ""]:
        """Return whether all chunks were fit, given the last state."""
        fit = is_finite(state) & self.bounded
        if self.weak is not None:
            fit &= jnp.min(self.weak) >= -WEAK
        return fit if self.size is None else fit & (jnp.max(self.size) < INFINITE)


def checked_chunk(
    program: TritonProgram,
    chunk: Int[Array, ""],
    carry: Any,
    by_products: Callable,
    by_token: Callable,
    must_be_finite: Callable,
) -> Any:
    """Run a chunk by products or, if it is unfit for them, token by token, and return the next carry.

    Args:
        carry: the state or states that enter the chunk.
        by_products: called with the program, the chunk, its decay and the carry; returns the next carry.
        by_token: the same without the decay, for any decay and any values.
        must_be_finite: returns the tile of a carry that shows whether it is finite.
    """
    decay = Decay.of(program, program.positions(chunk))
    after = by_products(program, chunk, decay, carry)
    return lax.cond(
        decay.bounded & is_finite(must_be_finite(after)),
        lambda _, after: after,
        lambda carry, _: by_token(program, chunk, carry),
        *(carry, after),
    )


def sums_from_half(
    tiling: TritonTiling, x: Float[Array, "c k"]
) -> tuple[Float[Array, "c k"], Float[Array, "_ k"], Float[Array, "_ k"]]:
    """Return the sums until every token minus half the total, and the half for the first and last token."""
    if tiling.by_products:
        i, j = (iota((tiling.chunk, tiling.chunk), axis) for axis in (0, 1))
        half = tiling.sums(jnp.full((tiling.value_width, tiling.chunk), 0.5), x)
        return tiling.sums(jnp.where(j <= i, 0.5, -0.5), x), half, half
    x = x.astype(jnp.float32)
    half = 0.5 * jnp.sum(x, axis=0)[None, :]
    # One running sum, so that rounding errors of its parts cancel in differences.
    relative = jnp.cumsum(jnp.where(iota(x.shape, 0) == 0, x - half, x), axis=0)
    return relative, half, pick(relative, tiling.chunk - 1)[None, :]


@dataclasses.dataclass(frozen=True)
class ChunkSegments:
    """The segments inside a chunk, as masks.

    first, last: tokens of the segment that enters the chunk and of the segment that leaves it.
    continues: tokens that continue the segment of the preceding token.
    same: pairs of tokens in the same segment.
    passes: whether one segment spans the entire chunk.
    """

    first: Bool[Array, " c"]
    last: Bool[Array, " c"]
    continues: Bool[Array, " c"]
    same: Bool[Array, "c c"]
    passes: Bool[Array, ""]

    @classmethod
    def of(cls, program: TritonProgram, chunk: Int[Array, ""]) -> "ChunkSegments | None":
        """Return the segments of a chunk, or None in a scan without segments."""
        if not program.tiling.segmented:
            return None
        positions = program.positions(chunk)
        start = chunk * program.tiling.chunk
        entering, leaving = program.segment(start - 1), program.segment(start + program.tiling.chunk - 1)
        here, before = program.segment(positions), program.segment(positions - 1)
        same = here[:, None] == here[None, :]
        return cls(here == entering, here == leaving, here == before, same, entering == leaving)


def only(x: Float[Array, "c n"], rows: Bool[Array, " c"] | None) -> Float[Array, "c n"]:
    """Return the tile with all other rows set to zero."""
    return x if rows is None else jnp.where(rows[:, None], x, 0.0)


def magnitude(x: Float[Array, "m n"]) -> Int[Array, "m n"]:
    """Return the bits of a float32 without the sign: the chip's maximum of two floats ignores NaN."""
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def is_finite(x: Float[Array, "m n"]) -> Bool[Array, ""]:
    """Return whether a tile of float32 has neither NaN nor infinities."""
    return jnp.max(magnitude(x)) < INFINITE


def causal(
    x: Float[Array, "c c"], segments: ChunkSegments | None, query_axis: int = 0
) -> Float[Array, "c c"]:
    """Keep the pairs of a query and a key that is not after it and in the same segment."""
    pairs = iota(x.shape, query_axis) >= iota(x.shape, 1 - query_axis)
    return jnp.where(pairs if segments is None else pairs & segments.same, x, 0.0)


def token_count(program: TritonProgram, chunk: Int[Array, ""]) -> Int[Array, ""]:
    """Return the number of tokens in a chunk, which may be cut off by the end of the scan."""
    tiling = program.tiling
    return jnp.minimum(tiling.chunk, tiling.tokens - chunk * tiling.chunk)


def token_decay(program: TritonProgram, position: Int[Array, ""]) -> Float[Array, " k"]:
    """Return the decay of one token, zero where a segment begins."""
    decay = program.tiling.exp2(program.tiling.log2_decay(program.load_token("g", position)))
    if program.tiling.segmented:
        decay = jnp.where(program.segment(position) == program.segment(position - 1), decay, 0.0)
    return decay


def through_token(
    program: TritonProgram, position: Int[Array, ""], state: Float[Array, "v k"]
) -> Float[Array, "v k"]:
    """Return a state decayed by one token. Where a segment begins, even NaN become zero."""
    state = state * token_decay(program, position)[None, :]
    if program.tiling.segmented:
        state = jnp.where(program.segment(position) == program.segment(position - 1), state, 0.0)
    return state


def next_state(
    program: TritonProgram, position: Int[Array, ""], state: Float[Array, "v k"]
) -> Float[Array, "v k"]:
    """Apply the recurrence to one token."""
    k, v = program.load_token("k", position), program.load_token("v", position)
    return through_token(program, position, state) + v[:, None] * k[None, :]
