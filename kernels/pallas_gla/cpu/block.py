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
    """The tokens of a chunk in N blocks of C, in float32, and the starts of segments."""

    q: Float[Array, "n b h c k"]
    k: Float[Array, "n b h c k"]
    v: Float[Array, "n b h c v"]
    g: Float[Array, "n b h c k"]
    starts: Bool[Array, "n b 1 c 1"] | None


class Block:
    """The blocks of a chunk: decayed queries and keys, and how states pass through."""

    def __init__(self, chunk: Chunk) -> None:
        q, k, self.v, g, starts = chunk
        x = _sums(_from_middle(), g)
        self.bounded = jnp.max(jnp.abs(x)) < LARGEST_SUM
        self.grow, self.shrink = jnp.exp(x), jnp.exp(-x)
        self.enter = (jnp.exp(g[..., 0, :]) * self.shrink[..., 0, :])[..., None]
        self.leave = self.grow[..., -1, :, None]
        self.q, self.k = q * self.grow, k * self.shrink
        causal = np.tri(BLOCK, dtype=bool)[None, None, None]
        self.first = self.last = self.through = None
        if starts is not None:
            run = jnp.cumsum(starts, axis=3, dtype=jnp.int32)
            causal = causal & (run == run.swapaxes(3, 4))
            self.first, self.last = run == 0, run == run[..., -1:, :]
            self.through = run[..., -1:, :] == 0
        self.causal = causal
        self.scores = jnp.where(causal, _dot("nbhik,nbhjk->nbhij", self.q, self.k), 0)

    def states(self, state):
        """Return the last state, and in the middle of each block the state of all earlier blocks.

        A state of None is zero and costs nothing; there must be a single block.
        """
        keys = _transposed(_where(self.last, self.k))
        new = _dot("nbhkj,nbhjv->nbhkv", keys, self.v)
        if state is None:
            return self.leave[0] * new[0], None

        def step(state, block):
            enter, leave, new, through = block
            state = enter * state
            return leave * (_where(through, state) + new), state

        return jax.lax.scan(step, state, (self.enter, self.leave, new, self.through))

    def output(self, before):
        """Return the output, given the states in the middle of the blocks."""
        inside = _dot("nbhij,nbhjv->nbhiv", self.scores, self.v)
        if before is None:
            return inside
        return inside + _dot("nbhik,nbhkv->nbhiv", _where(self.first, self.q), before)

    def gradients(self, before, d_state, d_o):
        """Return the gradients of the incoming state and of (q, k, v, g)."""
        d_state, after = self._state_gradients(before, d_state, d_o)
        keys = _where(self.last, self.k)
        d_v = _dot("nbhji,nbhiv->nbhjv", _transposed(self.scores), d_o) + _dot(
            "nbhjk,nbhkv->nbhjv", keys, after
        )
        d_scores = jnp.where(self.causal, _dot("nbhiv,nbhjv->nbhij", d_o, self.v), 0)
        d_scores_t = _transposed(d_scores)
        d_q = _dot("nbhij,nbhjk->nbhik", d_scores, self.k)
        d_keys = _where(self.last, _dot("nbhjv,nbhkv->nbhjk", self.v, after))
        d_k = _dot("nbhji,nbhik->nbhjk", d_scores_t, self.q) + d_keys
        d_g = self._inside(d_scores, d_scores_t) + _sums(np.tri(BLOCK, k=-1), self.k * d_keys)
        if before is not None:
            d_queries = _where(self.first, _dot("nbhiv,nbhkv->nbhik", d_o, before))
            d_q = d_q + d_queries
            ones = _constant(np.ones((after.shape[4], 1)), after)
            d_through = _where(self.through, _dot("nbhkv,nbhvi->nbhik", before * after, ones))
            d_g = d_g + _sums(np.tri(BLOCK).T, self.q * d_queries) + d_through
        return d_state, (self.grow * d_q, self.shrink * d_k, d_v, d_g)

    def _state_gradients(self, before, d_state, d_o):
        """Return the gradients of the incoming state and, at the end of each block, of its tokens' state."""
        if before is None:
            return None, self.leave * d_state[None]
        d_before = _dot("nbhki,nbhiv->nbhkv", _transposed(_where(self.first, self.q)), d_o)

        def step(d_state, block):
            enter, leave, d_before, through = block
            d_state = leave * d_state
            return enter * (_where(through, d_state) + d_before), d_state

        blocks = (self.enter, self.leave, d_before, self.through)
        return jax.lax.scan(step, d_state, blocks, reverse=True)

    def _inside(self, d_scores, d_scores_t):
        """Return the gradient of g from pairs of tokens inside a block."""
        d_g = jnp.zeros_like(self.q)
        for pairs, tokens in zip(*_levels(), strict=True):
            here = jnp.where(pairs[None, None, None], d_scores, 0)
            here_t = jnp.where(pairs.T[None, None, None], d_scores_t, 0)
            terms = self.q * _dot("nbhij,nbhjk->nbhik", here, self.k)
            terms = terms + self.k * _dot("nbhji,nbhik->nbhjk", here_t, self.q)
            d_g = d_g + _sums(tokens.T, terms)
        return d_g


def _sums(matrix: np.ndarray, terms: Float[Array, "n b h i k"]) -> Float[Array, "n b h t k"]:
    """Return the sums of terms that the rows of a matrix select."""
    return _dot("nbhti,nbhik->nbhtk", _constant(matrix, terms), terms)


def _from_middle() -> np.ndarray:
    """Return the matrix that sums tokens from the middle of a block to i, negatively before the middle."""
    sums = np.tri(BLOCK)
    return sums - sums[BLOCK // 2 - 1]


@functools.cache
def _levels() -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs [level, i, j] of each level, and for each token [level, i, t] which g its pairs share.

    A token i of the second group shares those from the start of the group to i, a token j of the first group
    those from j + 1 to the end of the group.
    """
    token = np.arange(BLOCK)
    pairs, tokens = [], []
    for size in (1 << level for level in range(BLOCK.bit_length() - 1)):
        group, second = token // size, token // size % 2 == 1
        pairs.append((group[:, None] == group + 1) & second[:, None])
        same = group[:, None] == group
        tokens.append(same & np.where(second[:, None], token <= token[:, None], token > token[:, None]))
    return np.stack(pairs), np.stack(tokens)


def _dot(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiply in float32."""
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def _constant(matrix: np.ndarray, like: Float[Array, "n b h c k"]) -> Float[Array, "n b h i j"]:
    """Return a matrix for every block of `like`.

    XLA would multiply by a matrix without batch axes in another layout, and copy the result.
    """
    return jnp.broadcast_to(jnp.asarray(matrix, jnp.float32), (*like.shape[:3], *matrix.shape))


def _transposed(x: Float[Array, "n b h c k"]) -> Float[Array, "n b h k c"]:
    """Copy to the transposed layout: a product that sums over the rows of both operands is twice as slow."""
    return jax.lax.optimization_barrier(x.swapaxes(3, 4))


def _where(condition: Bool[Array, "..."] | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x, and zero where the condition is false."""
    return x if condition is None else jnp.where(condition, x, 0)


def finite(*arrays: Float[Array, "n b h c _"]) -> Bool[Array, ""]:
    """Return whether the first and the last row of all matrices are finite."""
    rows = [x[..., i, :] for x in arrays for i in (0, -1)]
    return functools.reduce(jnp.logical_and, [jnp.max(jnp.abs(x)) < jnp.inf for x in rows])
