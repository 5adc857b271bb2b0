"""The mathematics of a chunk: GLA and its gradients in blocks of 16 tokens.

With x_i the sum of g from the middle of a block to token i (negative before the middle), token i sees token
j <= i of its block through exp(x_i - x_j). So all scores of a block are one product, of q exp(x) and
k exp(-x), which is accurate as long as |x| is small. States pass from block to block. See Yang et al. (2024),
section 4.1.

The gradient of g_t is a sum over all pairs j < t <= i. The textbook computes it as a running sum of
q dq - k dk, a small difference of large numbers. Here the pairs of a block are grouped into levels of 1, 2, 4
and 8 tokens: i is in the second and j in the first of two neighboring groups. All sums over i or j are then
sums of terms that belong to the result, and nothing is subtracted.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

BLOCK = 16
# exp(2 * 30) is far from overflow, and a sum of 30 has a rounding error of 1e-6.
LARGEST_SUM = 30.0


class Chunk(NamedTuple):
    """The tokens of a chunk in N blocks of C, in float32, and the starts of segments.

    The first axis holds the M = N * B * H blocks of all batch elements and heads. More axes, or axes of size
    1, would keep XLA from fusing matrix products.
    """

    q: Float[Array, "m c k"]
    k: Float[Array, "m c k"]
    v: Float[Array, "m c v"]
    g: Float[Array, "m c k"]
    starts: Bool[Array, "m c 1"] | None
    shape: tuple[int, int, int]


class Block:
    """The blocks of a chunk: decayed queries and keys, and how states pass through."""

    def __init__(self, chunk: Chunk) -> None:
        q, k, self.v, g, starts, self.shape = chunk
        x = _sums(_from_middle(), g)
        self.grow, self.shrink = jnp.exp(x), jnp.exp(-x)
        self.enter = (jnp.exp(g[:, 0]) * self.shrink[:, 0])[..., None]
        self.leave = self.grow[:, -1, :, None]
        self.q, self.k = q * self.grow, k * self.shrink
        causal = np.tri(BLOCK, dtype=bool)[None]
        self.first = self.last = self.through = None
        if starts is not None:
            run = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
            causal = causal & (run == run.swapaxes(1, 2))
            self.first, self.last = run == 0, run == run[:, -1:]
            self.through = run[:, -1:] == 0
        self.causal = causal
        self.scores = jnp.where(causal, _dot("mik,mjk->mij", self.q, self.k), 0)

    def states(self, state):
        """Return the last state, and in the middle of each block the state of all earlier blocks.

        A state of None is zero and costs nothing; there must be a single block.
        """
        keys = _transposed(_where(self.last, self.k))
        new = _dot("mkj,mjv->mkv", keys, self.v)
        if state is None:
            return self._split(self.leave * new)[0], None

        def step(state, block):
            enter, leave, new, through = block
            state = enter * state
            return leave * (_where(through, state) + new), state

        return self._scan(step, state, new)

    def output(self, before):
        """Return the output, given the states in the middle of the blocks."""
        inside = _dot("mij,mjv->miv", self.scores, self.v)
        if before is None:
            return inside
        return inside + _dot("mik,mkv->miv", _where(self.first, self.q), before)

    def gradients(self, before, d_state, d_o):
        """Return the gradients of the incoming state and of (q, k, v, g)."""
        d_state, after = self._state_gradients(before, d_state, d_o)
        keys = _where(self.last, self.k)
        d_v = _dot("mji,miv->mjv", _transposed(self.scores), d_o) + _dot("mjk,mkv->mjv", keys, after)
        d_scores = jnp.where(self.causal, _dot("miv,mjv->mij", d_o, self.v), 0)
        d_scores_t = _transposed(d_scores)
        d_q = _dot("mij,mjk->mik", d_scores, self.k)
        d_keys = _where(self.last, _dot("mjv,mkv->mjk", self.v, after))
        d_k = _dot("mji,mik->mjk", d_scores_t, self.q) + d_keys
        d_g = self._inside(d_scores, d_scores_t) + _sums(np.tri(BLOCK, k=-1), self.k * d_keys)
        if before is not None:
            d_queries = _where(self.first, _dot("miv,mkv->mik", d_o, before))
            d_q = d_q + d_queries
            d_through = _where(self.through, jnp.sum(before * after, axis=2)[:, None])
            d_g = d_g + _sums(np.tri(BLOCK).T, self.q * d_queries) + d_through
        return d_state, (self.grow * d_q, self.shrink * d_k, d_v, d_g)

    def _state_gradients(self, before, d_state, d_o):
        """Return the gradients of the incoming state and, at the end of each block, of its tokens' state."""
        if before is None:
            return None, self.leave * d_state.reshape(-1, *d_state.shape[2:])
        d_before = _dot("mki,miv->mkv", _transposed(_where(self.first, self.q)), d_o)

        def step(d_state, block):
            enter, leave, d_before, through = block
            d_state = leave * d_state
            return enter * (_where(through, d_state) + d_before), d_state

        return self._scan(step, d_state, d_before, reverse=True)

    def _scan(self, step, state, new, reverse=False):
        """Pass a state through the blocks; return the last one and one per block."""
        blocks = jax.tree.map(self._split, (self.enter, self.leave, new, self.through))
        state, states = jax.lax.scan(step, state, blocks, reverse=reverse, unroll=True)
        return state, states.reshape(-1, *states.shape[3:])

    def _split(self, x):
        """Split the first axis into blocks, batch elements and heads."""
        return x.reshape(*self.shape, *x.shape[1:])

    def _inside(self, d_scores, d_scores_t):
        """Return the gradient of g from pairs of tokens inside a block.

        One product per level gives all sums: over the first group for a token of the second, whose row holds
        its query, and over the second group for a token of the first, whose row holds its key. Products by
        constants select the rows, because XLA fuses products and sums into one kernel, but not jnp.where.
        """
        pairs, second, tokens = _levels()

        def select(mask, x):
            mask = jnp.asarray(np.broadcast_to(mask, (len(mask), *x.shape[1:])), jnp.float32)
            shape = (x.shape[0], *mask.shape)
            return jnp.broadcast_to(mask, shape) * jnp.broadcast_to(x[:, None], shape)

        symmetric = jnp.where(np.tri(BLOCK, dtype=bool)[None], d_scores, d_scores_t)
        rows = select(second[..., None], self.q) + select(~second[..., None], self.k)
        terms = rows * _dot("mlij,mljk->mlik", select(pairs, symmetric), rows)
        return jnp.sum(_sums(tokens, terms), axis=1)


def _sums(
    matrix: Bool[np.ndarray, "*l t i"] | Float[np.ndarray, "*l t i"], terms: Float[Array, "m *l i k"]
) -> Float[Array, "m *l t k"]:
    """Return the sums of terms that the rows of a matrix select."""
    return _dot("m...ti,m...ik->m...tk", _constant(matrix, terms), terms)


def _from_middle() -> np.ndarray:
    """Return the matrix that sums tokens from the middle of a block to i, negatively before the middle."""
    sums = np.tri(BLOCK)
    return sums - sums[BLOCK // 2 - 1]


@functools.cache
def _levels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three arrays for the levels.

    They are the pairs [level, i, j] in either order, the tokens [level, i] in second groups, and for every g
    [level, t, i] the tokens whose pairs share it. A token i of the second group shares those from the start
    of the group to i, a token j of the first group those from j + 1 to the end of the group.
    """
    token = np.arange(BLOCK)
    pairs, seconds, tokens = [], [], []
    for size in (1 << level for level in range(BLOCK.bit_length() - 1)):
        group, second = token // size, token // size % 2 == 1
        below = (group[:, None] == group + 1) & second[:, None]
        pairs.append(below | below.T)
        seconds.append(second)
        same = group[:, None] == group
        tokens.append(same & np.where(second[:, None], token <= token[:, None], token > token[:, None]))
    return np.stack(pairs), np.stack(seconds), np.stack(tokens).swapaxes(1, 2)


def _dot(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiply in float32."""
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def _constant(matrix: np.ndarray, like: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
    """Return a matrix for every block of `like`.

    XLA would multiply by a matrix without batch axes in another layout, and copy the result.
    """
    return jnp.broadcast_to(jnp.asarray(matrix, jnp.float32), (like.shape[0], *matrix.shape))


def _transposed(x: Float[Array, "m c k"]) -> Float[Array, "m k c"]:
    """Copy to the transposed layout: a product that sums over the rows of both operands is twice as slow."""
    return jax.lax.optimization_barrier(x.swapaxes(1, 2))


def _where(condition: Bool[Array, "..."] | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x, and zero where the condition is false."""
    return x if condition is None else jnp.where(condition, x, 0)
