"""The backward pass over a chunk for any decay and any values.

A pair of tokens j < i belongs to the level of 1, 2, 4, … tokens at which i is in the second and j in the
first of two neighboring groups. Relative to the border between the groups both decays are at most 1, so
nothing overflows. With q^, k^ decayed to the border and P = dO v^T, the pairs of a level add

    dq_i += exp(G_i - border) (P k^)_i              dk_j += exp(border - G_j) (P^T q^)_j
    dg_t += sum_{i >= t} (q^ P k^)_i                for t in the second group, sums within the group
    dg_t += sum_{j < t} (k^ P^T q^)_j               for t in the first group

and the states at the chunk's ends add their own such sums. All terms of dg belong to the result and nothing
is subtracted, so it is as accurate as the other gradients.

A product of matrices would spread a NaN or infinity to all tokens, even times zero. Such numbers count as
zero here, and the results that depend on them become NaN.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.triton.chunk import ChunkSegments, chunk_decay, only
from pallas_gla.triton.tiling import TritonProgram, iota

# Decays in bits are at least this, which is zero in float32 as a factor.
LEAST = -1024.0
State = Float[Array, "v k"]
Flags = Float[Array, " c"]


@dataclasses.dataclass(frozen=True)
class Levels:
    """The tokens of one chunk as operands of products, without NaN and infinities.

    decay: log decays, in units of `unit` bits.
    bad: flags of 1 for the tokens that had a NaN or infinity, by array.
    """

    program: TritonProgram
    chunk: Int[Array, ""]
    segments: ChunkSegments | None
    g: Float[Array, "c k"]
    unit: float
    q: Float[Array, "c k"]
    d_o: Float[Array, "c v"]
    bad: dict[str, Flags]

    @classmethod
    def of(cls, program: TritonProgram, chunk: Int[Array, ""]) -> "Levels":
        """Return the tokens of a chunk."""
        positions, bad = program.positions(chunk), {}
        g, unit = chunk_decay(program, positions)
        bad["g"] = jnp.max(jnp.where(g <= 0, 0.0, 1.0), axis=1)
        g = jnp.where((g >= LEAST) & (g <= 0), g, jnp.asarray(LEAST, g.dtype))
        q, bad["q"] = finite(program, "q", positions)
        d_o, bad["d_o"] = finite(program, "d_o", positions)
        return cls(program, chunk, ChunkSegments.of(program, chunk), g, unit, q, d_o, bad)

    @property
    def _pairs(self) -> tuple[Int[Array, "c c"], Int[Array, "c c"]]:
        """Rows and columns of a tile of pairs.

        The zero depends on the chunk. Otherwise the compiler computes all masks before the loop over chunks,
        where they occupy registers.
        """
        shape, zero = (self.program.tiling.chunk,) * 2, jnp.minimum(self.chunk, 0)
        return iota(shape, 0) + zero, iota(shape, 1) + zero

    def _masked(self, pairs: Bool[Array, "c c"], x: Float[Array, "c c"]) -> Float[Array, "c c"]:
        return jnp.where(
            pairs if self.segments is None else pairs & self.segments.same, x, jnp.zeros((), x.dtype)
        )

    def _sums(self, tokens: Bool[Array, "c c"], x: Float[Array, "c k"]) -> Float[Array, "c k"]:
        """Return, for every row of marks, the sum of the marked tokens."""
        tiling = self.program.tiling
        return tiling.sums(jnp.where(tokens, 1.0, 0.0), x, 3 if tiling.dtype == jnp.float32 else 2)

    def _decay(self, tokens: Bool[Array, "c c"]) -> Float[Array, "c k"]:
        """Return, for every row, the decay of the marked tokens together."""
        tiling = self.program.tiling
        return tiling.exp2(self._sums(tokens, self.g) * self.unit)

    def state_gradient(self, d_state: State) -> State:
        """Return the gradient of the incoming state, given the outgoing state's."""
        tiling, segments = self.program.tiling, self.segments
        first = None if segments is None else segments.first
        d_state = d_state * self._total()[None, :]
        if segments is not None:
            d_state = jnp.where(segments.passes, d_state, 0.0)
        i, j = self._pairs
        q = only(self.q.astype(jnp.float32) * (self._decay(j <= i) * tiling.scan.scale), first)
        d_state += tiling.dot(self.d_o, q, (0, 0))
        flags = only((self.bad["q"] + self.bad["d_o"] + self.bad["g"])[:, None], first)
        return jnp.where(jnp.max(flags) > 0, jnp.nan, d_state)

    def _total(self) -> Float[Array, " k"]:
        g = self.g.astype(jnp.float32) * self.unit
        return self.program.tiling.exp2(jnp.sum(g, axis=0))

    def store_gradients(self, state: State, d_state: State) -> Float[Array, "c k"]:
        """Store the gradients of q, k and v; return that of g.

        `state` is the incoming state, and `d_state` the gradient of the outgoing state.
        """
        program, tiling, segments = self.program, self.program.tiling, self.segments
        positions = program.positions(self.chunk)
        first, last = (None, None) if segments is None else (segments.first, segments.last)
        i, j = self._pairs
        bad_state, bad_d_state = irregular(state), irregular(d_state)
        state, d_state = regular(state), regular(d_state)
        through = jnp.sum(state * d_state, axis=0) * self._total()
        if segments is not None:
            through = jnp.where(segments.passes, through, 0.0)
        k, self.bad["k"] = finite(program, "k", positions)
        v, self.bad["v"] = finite(program, "v", positions)
        before, after = self._reached(first, last, bad_state, bad_d_state)
        bad = self.bad
        # Keys in the outgoing state, and queries that read the incoming one.
        decay = self._decay(j > i)
        keys = only(k.astype(jnp.float32) * decay, last)
        d_v = tiling.dot(keys, d_state, (1, 1)) + tiling.dot(self._scores(k), self.d_o)
        program.store("d_v", positions, nan_where(after + bad["q"] + bad["d_o"] + bad["k"], d_v))
        d_k = only(tiling.dot(v, d_state) * decay, last)
        d_g = through[None, :] + self._sums(j < i, d_k * k.astype(jnp.float32))
        scale = tiling.scan.scale
        d_q = only(tiling.dot(self.d_o, state) * self._decay(j <= i), first)
        d_g += self._sums(j >= i, d_q * (self.q.astype(jnp.float32) * scale))
        d_scores = jnp.where(i > j, tiling.dot(self.d_o, v, (1, 1)), tiling.dot(v, self.d_o, (1, 1)))
        # Every token reads its own key.
        own = jnp.sum(jnp.where(i == j, d_scores, 0.0), axis=1)[:, None]
        d_q += own * k.astype(jnp.float32)
        d_k += own * (self.q.astype(jnp.float32) * scale)
        d_q, d_k, d_g = self._pair_gradients(
            k, tiling.operand(self._masked(i != j, d_scores)), (d_q, d_k, d_g)
        )
        program.store("d_q", positions, nan_where(before + bad["k"] + bad["v"] + bad["d_o"], d_q * scale))
        program.store("d_k", positions, nan_where(after + bad["q"] + bad["d_o"] + bad["v"], d_k))
        return nan_where(before + after + bad["q"] + bad["d_o"], d_g)

    def _level(self, n: Int[Array, ""], k: Float[Array, "c k"]) -> tuple:
        """Return a level's queries and keys decayed to the border, the decay, and the groups of all pairs."""
        i, j = self._pairs
        group, other = (lax.shift_right_logical(x, jnp.broadcast_to(n, x.shape)) for x in (i, j))
        tokens = (group == other) & jnp.where((group & 1) == 1, j <= i, j > i)
        decay = self._decay(tokens)
        return jnp.where(self._second(n), self.q, k).astype(jnp.float32) * decay, decay, group, other

    def _second(self, n: Int[Array, ""]) -> Bool[Array, "c k"]:
        """Return which tokens are in the second of two neighboring groups, and so queries."""
        row = iota(self.q.shape, 0) + jnp.minimum(self.chunk, 0)
        return (lax.shift_right_logical(row, jnp.broadcast_to(n, row.shape)) & 1) == 1

    def _over_levels(self, step: Callable, sums: Any) -> Any:
        levels = self.program.tiling.chunk.bit_length() - 1
        return lax.fori_loop(jnp.int32(0), jnp.int32(levels), step, sums)

    def _scores(self, k: Float[Array, "c k"]) -> Float[Array, "c c"]:
        """Return the transposed scores."""
        tiling = self.program.tiling
        i, j = self._pairs

        def step(n: Int[Array, ""], scores: Float[Array, "c c"]) -> Float[Array, "c c"]:
            x, _, group, other = self._level(n, k)
            return jnp.where(
                (group ^ other) == 1, tiling.operand(tiling.dot(x, x, (1, 1)) * tiling.scan.scale), scores
            )

        own = tiling.operand(tiling.dot(k, self.q, (1, 1)) * tiling.scan.scale)
        return self._masked(j >= i, self._over_levels(step, own))

    def _pair_gradients(self, k: Float[Array, "c k"], d_scores: Float[Array, "c c"], sums: tuple) -> tuple:
        """Add the terms of all pairs to the gradients of q, k and g.

        The gradient of the scores is symmetric: a product serves queries and keys.
        """
        tiling = self.program.tiling

        def step(n: Int[Array, ""], sums: tuple) -> tuple:
            d_q, d_k, d_g = sums
            x, decay, group, other = self._level(n, k)
            d_x = tiling.dot(jnp.where((group ^ other) == 1, d_scores, jnp.zeros((), d_scores.dtype)), x)
            i, j = self._pairs
            tokens = (group == other) & jnp.where((group & 1) == 1, i <= j, i > j)
            scale = tiling.scan.scale
            d_g += self._sums(tokens, x * d_x) * scale
            d_x *= decay
            second = self._second(n)
            return d_q + jnp.where(second, d_x, 0.0), d_k + jnp.where(second, 0.0, d_x * scale), d_g

        return self._over_levels(step, sums)

    def _reached(
        self, first: Any, last: Any, bad_state: Float[Array, ""], bad_d_state: Float[Array, ""]
    ) -> tuple[Flags, Flags]:
        """Flag the tokens that see a NaN or infinity of an earlier, or of a later one."""
        i, j = self._pairs
        bad = self.bad
        column = jnp.broadcast_to((bad["k"] + bad["v"] + bad["g"])[None, :], i.shape)
        before = jnp.max(self._masked(j < i, column), axis=1)
        column = jnp.broadcast_to((bad["q"] + bad["d_o"] + bad["g"])[None, :], i.shape)
        after = jnp.max(self._masked(j > i, column), axis=1)
        states = (
            only(jnp.broadcast_to(x, i.shape), rows) for x, rows in ((bad_state, first), (bad_d_state, last))
        )
        in_state, in_d_state = (jnp.max(x, axis=1) for x in states)
        return before + in_state + bad["g"], after + in_d_state + bad["g"]


def finite(
    program: TritonProgram, name: str, positions: Int[Array, " c"]
) -> tuple[Float[Array, "c n"], Flags]:
    """Load an operand with zeros for NaN and infinities, and flags of the tokens that had some."""
    x = program.tiling.operand(program.load(name, positions))
    return regular(x), jnp.max(jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, 0.0, 1.0), axis=1)


def regular(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Replace NaN and infinities by zeros."""
    return jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, x, jnp.zeros((), x.dtype))


def irregular(x: Float[Array, "m n"]) -> Float[Array, ""]:
    """Return 1 if there is a NaN or infinity, else 0."""
    return jnp.max(jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0))


def nan_where(flags: Flags, x: Float[Array, "c n"]) -> Float[Array, "c n"]:
    """Return the tile with NaN in the flagged rows."""
    return jnp.where(flags[:, None] > 0, jnp.nan, x)
