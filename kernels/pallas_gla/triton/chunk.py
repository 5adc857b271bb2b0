"""Operations on one chunk that the GPU kernels share: decay, segments, masks and the recurrence."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.triton.tiling import LOG2_E, TritonProgram, iota, pick

# Largest decay of half a chunk, in bits, for which the factors relative to the chunk's middle, and sums of
# their products with keys and values, stay finite.
SPAN = 64.0
# Largest decay of half a chunk, in bits, of the channel that decays least, for which a running sum gives dg.
# If all channels decay strongly at a token, its dg is small, and other tokens' rounding errors would hide it.
WEAK = 6.0


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
    """The decay inside a chunk, in base-2 logarithms.

    relative: decay from the chunk's middle to every token, without the first token's, which may be a reset.
    before, after: decay of the first and of the second half, in one row or in one row per value of a state.
    """

    relative: Float[Array, "c k"]
    before: Float[Array, "_ k"]
    after: Float[Array, "_ k"]
    keys: int

    @classmethod
    def of(cls, program: TritonProgram, positions: Int[Array, " c"]) -> "Decay":
        """Return the decay of the chunk at these positions."""
        tiling = program.tiling
        g, unit = chunk_decay(program, positions)
        half = tiling.chunk // 2
        if not tiling.by_products:
            g, row = g.astype(jnp.float32) * unit, iota(g.shape, 0)
            # One running sum from the middle, so that rounding errors of its parts cancel in differences.
            first_half = jnp.sum(jnp.where((row > 0) & (row < half), g, 0.0), axis=0)[None, :]
            relative = jnp.cumsum(jnp.where(row > 0, g, -first_half), axis=0)
            before, after = first_half + pick(g, 0)[None, :], pick(relative, tiling.chunk - 1)[None, :]
            return cls(relative, before, after, tiling.keys)
        i, j = (iota((tiling.chunk, tiling.chunk), axis) for axis in (0, 1))
        from_middle = jnp.where(j < half, jnp.where(j > i, -1.0, 0.0), jnp.where(j <= i, 1.0, 0.0))
        j = iota((tiling.value_width, tiling.chunk), 1)
        before, after = (jnp.where(tokens, 1.0, 0.0) for tokens in (j < half, j >= half))
        relative, before, after = (tiling.sums(marks, g) * unit for marks in (from_middle, before, after))
        return cls(relative, before, after, tiling.keys)

    @property
    def bounded(self) -> Bool[Array, ""]:
        """Whether the factors relative to the middle are at most 2**SPAN."""
        return jnp.max(jnp.abs(self.relative)) <= SPAN

    @property
    def weak(self) -> Bool[Array, ""]:
        """Whether it is also weak enough for a running sum of dg, in every token in at least one channel."""
        first = iota(self.relative.shape, 0) == 0
        halves = jnp.where(first, -self.relative, -jnp.inf), self.after
        if self.keys != self.after.shape[1]:
            halves = [jnp.where(iota(x.shape, 1) < self.keys, x, -jnp.inf) for x in halves]
        return self.bounded & (jnp.max(halves[0]) >= -WEAK) & (jnp.max(halves[1]) >= -WEAK)


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


def is_finite(x: Float[Array, "m n"]) -> Bool[Array, ""]:
    """Return whether a tile of float32 has neither NaN nor infinities."""
    # As integers, because the chip's maximum of two floats ignores NaN.
    magnitude = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    return jnp.max(magnitude) < 0x7F800000


def causal(
    x: Float[Array, "c c"], segments: ChunkSegments | None, query_axis: int = 0
) -> Float[Array, "c c"]:
    """Keep the pairs of a query and a key that is not after it and in the same segment."""
    pairs = iota(x.shape, query_axis) >= iota(x.shape, 1 - query_axis)
    return jnp.where(pairs if segments is None else pairs & segments.same, x, 0.0)


def part_decay(program: TritonProgram) -> Float[Array, " k"]:
    """Return the sum of the log decays of a part of a split scan, in bits."""

    def step(chunk: Int[Array, ""], log2_decay: Float[Array, " k"]) -> Float[Array, " k"]:
        g, unit = chunk_decay(program, program.positions(chunk))
        return log2_decay + jnp.sum(g.astype(jnp.float32), axis=0) * unit

    return program.loop(step, jnp.zeros((program.tiling.key_width,), jnp.float32))


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
