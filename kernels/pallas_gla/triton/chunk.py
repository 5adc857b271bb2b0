"""What the GPU kernels know of a chunk: its decay, its segments, its masks, and the recurrence itself."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.triton.tiling import LOG2_E, TritonProgram, iota, pick

# Either half of a chunk may decay by 2**-SPAN at most, so that the factors relative to its middle, and sums
# of their products with keys and values, stay finite.
SPAN = 64.0


def chunk_decay(program: TritonProgram, positions: Int[Array, " c"]) -> tuple[Float[Array, "c k"], float]:
    """The decays of a chunk, none beyond the end, and what turns them into base-2 logarithms."""
    tiling, g = program.tiling, program.load("g", positions)
    if tiling.scan.gating is None:
        return g, LOG2_E
    g, inside = tiling.log2_decay(g), program.inside(positions)
    # One rounding to bfloat16 changes a decay by at most 0.1 %, and saves half the products of its sums.
    return tiling.operand(g if inside is None else jnp.where(inside[:, None], g, 0.0)), 1.0


@dataclasses.dataclass(frozen=True)
class Decay:
    """The decay inside a chunk, in base-2 logarithms.

    relative: from the chunk's middle to every token. Not the first one's own decay, which may be a reset.
    before, after: of the first half of the tokens and of the second, in one row or in as many as a state has.
    """

    relative: Float[Array, "c k"]
    before: Float[Array, "_ k"]
    after: Float[Array, "_ k"]

    @classmethod
    def of(cls, program: TritonProgram, positions: Int[Array, " c"]) -> "Decay":
        """Sums a chunk's logarithms."""
        tiling = program.tiling
        g, unit = chunk_decay(program, positions)
        half = tiling.chunk // 2
        if not tiling.by_products:
            g, row = g.astype(jnp.float32) * unit, iota(g.shape, 0)
            total = jnp.cumsum(jnp.where(row > 0, g, 0.0), axis=0)
            halves = (jnp.sum(jnp.where(rows, g, 0.0), axis=0)[None, :] for rows in (row < half, row >= half))
            return cls(total - pick(total, half - 1), *halves)
        i, j = (iota((tiling.chunk, tiling.chunk), axis) for axis in (0, 1))
        from_middle = jnp.where(j < half, jnp.where(j > i, -1.0, 0.0), jnp.where(j <= i, 1.0, 0.0))
        j = iota((tiling.value_width, tiling.chunk), 1)
        before, after = (jnp.where(tokens, 1.0, 0.0) for tokens in (j < half, j >= half))
        return cls(*(tiling.sums(marks, g) * unit for marks in (from_middle, before, after)))

    @property
    def bounded(self) -> Bool[Array, ""]:
        """Whether the factors relative to the middle are within 2**SPAN."""
        return jnp.max(jnp.abs(self.relative)) <= SPAN


@dataclasses.dataclass(frozen=True)
class Runs:
    """The segments inside a chunk.

    first, last: which tokens belong to the segment that enters and to the one that leaves.
    goes_on: which tokens continue the segment of the one before.
    same: which pairs of tokens share a segment.
    passes: whether one segment goes through the whole chunk.
    """

    first: Bool[Array, " c"]
    last: Bool[Array, " c"]
    goes_on: Bool[Array, " c"]
    same: Bool[Array, "c c"]
    passes: Bool[Array, ""]

    @classmethod
    def of(cls, program: TritonProgram, chunk: Int[Array, ""]) -> "Runs | None":
        """Of a chunk; None in a scan without segments."""
        if not program.tiling.segmented:
            return None
        positions = program.positions(chunk)
        start = chunk * program.tiling.chunk
        entering, leaving = program.run(start - 1), program.run(start + program.tiling.chunk - 1)
        run, before = program.run(positions), program.run(positions - 1)
        same = run[:, None] == run[None, :]
        return cls(run == entering, run == leaving, run == before, same, entering == leaving)


def only(x: Float[Array, "c n"], rows: Bool[Array, " c"] | None) -> Float[Array, "c n"]:
    """The tile with zeros in all other rows."""
    return x if rows is None else jnp.where(rows[:, None], x, 0.0)


def causal(x: Float[Array, "c c"], runs: Runs | None, query_axis: int = 0) -> Float[Array, "c c"]:
    """The pairs of a query and a key of its segment that is not after it."""
    pairs = iota(x.shape, query_axis) >= iota(x.shape, 1 - query_axis)
    return jnp.where(pairs if runs is None else pairs & runs.same, x, 0.0)


def run_part(
    program: TritonProgram, take: Callable[..., Float[Array, "v k"]], backward: bool = False
) -> None:
    """The first pass over a split scan, where `take(program, chunk, state)` returns the next state.

    Stores what this part makes of a zero state, and the factor by which another one would pass through.
    """

    def step(chunk: Int[Array, ""], carry: tuple) -> tuple:
        state, log2_decay = carry
        g, unit = chunk_decay(program, program.positions(chunk))
        log2_decay += jnp.sum(g.astype(jnp.float32), axis=0) * unit
        return take(program, chunk, state), log2_decay

    carry = (program.zero_state(), jnp.zeros((program.tiling.key_width,), jnp.float32))
    program.store_part(*program.loop(step, carry, backward))


def token_count(program: TritonProgram, chunk: Int[Array, ""]) -> Int[Array, ""]:
    """How many tokens a chunk has before the end of the scan."""
    tiling = program.tiling
    return jnp.minimum(tiling.chunk, tiling.tokens - chunk * tiling.chunk)


def token_decay(program: TritonProgram, position: Int[Array, ""]) -> Float[Array, " k"]:
    """The decay of one token; zero where a segment begins."""
    decay = program.tiling.exp2(program.tiling.log2_decay(program.load_token("g", position)))
    if program.tiling.segmented:
        decay = jnp.where(program.run(position) == program.run(position - 1), decay, 0.0)
    return decay


def next_state(
    program: TritonProgram, position: Int[Array, ""], state: Float[Array, "v k"]
) -> Float[Array, "v k"]:
    """The recurrence over one token."""
    k, v = program.load_token("k", position), program.load_token("v", position)
    return state * token_decay(program, position)[None, :] + v[:, None] * k[None, :]
