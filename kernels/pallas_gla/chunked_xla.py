"""GLA in chunks, in plain JAX: matrix products on every platform, exact for every decay <= 0.

Inside a chunk, token i sees token j <= i through the decay exp(g_{j+1} + ... + g_i). The textbook form
exp(G_i - G_j) of cumulative sums G overflows or cancels when decays are strong, so the pairs are met by
doubling instead. Take two neighbouring blocks of b tokens, i in the second and j in the first:

    g_{j+1} + ... + g_i = (from j + 1 to the end of the first block) + (from the start of the second one to i)

Both parts are sums of numbers <= 0 and nothing is ever subtracted, so both factors exp(...) are accurate and
at most 1, and the scores of all b x b pairs are one matrix product of decayed queries and keys. Blocks of 1,
2, 4, ... tokens cover every pair of the chunk once. In the end the sums reach to the chunk's own ends, which
is what the recurrence from chunk to chunk needs. (Yang et al. 2024: chunkwise form, section 4.1; products
between blocks inside a chunk, section 4.3.)

Reverse mode recomputes a chunk from its inputs and the state that entered it (`jax.checkpoint`). Plain JAX
has forward mode too, which a custom_vjp would lose.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_gla.scan_order import segment_starts, to_raster_order, to_scan_order, zero_state

# Forward and backward on two CPU cores, float32, K = 32, V = 64, in ms:
#   chunk                  16     32     64
#   B=128 T=64  H=2      22.3   29.7   15.6
#   B=32  T=256 H=6      84.2   89.6    102
# Longer chunks also store fewer states and take fewer sequential steps.
CHUNK_SIZE = 64


@functools.partial(jax.jit, static_argnames=("scale", "grid", "direction", "chunk_size"))
def forward(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h k"],
    *,
    scale: float,
    initial_state: Float[Array, "b h k v"] | None,
    segment_ids: Int[Array, "b t"] | None,
    grid: tuple[int, int],
    direction: str,
    chunk_size: int | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """The contract of `pallas_gla.backends`."""
    tokens = q.shape[1]
    size = min(chunk_size or CHUNK_SIZE, 1 << (tokens - 1).bit_length())
    order = functools.partial(to_scan_order, grid=grid, direction=direction)
    starts = None if segment_ids is None else segment_starts(order(segment_ids))
    arrays = jax.tree.map(functools.partial(_pad, multiple=size), (*map(order, (q, k, v, g)), starts))
    chunk = functools.partial(_chunk, scale=scale)
    if tokens <= size:
        final_state, o = jax.checkpoint(chunk)(initial_state, arrays)
    else:
        state = zero_state(k, v, g)
        if initial_state is not None:
            state += initial_state
        # The loop keeps the recomputation apart from the forward pass; barriers against CSE are not needed.
        body = jax.checkpoint(chunk, prevent_cse=False)
        final_state, o = jax.lax.scan(body, state, jax.tree.map(functools.partial(_split, size=size), arrays))
        o = o.swapaxes(0, 1).reshape(o.shape[1], -1, *o.shape[3:])
    return to_raster_order(o[:, :tokens], grid, direction), final_state


def _chunk(
    state: Float[Array, "b h k v"] | None,
    arrays: tuple[
        Float[Array, "b c h k"],
        Float[Array, "b c h k"],
        Float[Array, "b c h v"],
        Float[Array, "b c h k"],
        Bool[Array, "b c"] | None,
    ],
    *,
    scale: float,
) -> tuple[Float[Array, "b h k v"], Float[Array, "b c h v"]]:
    """Runs the recurrence over one chunk of (q, k, v, g, starts of segments); returns its last state and o.

    A state of None is zero and costs nothing.
    """
    *arrays, starts = arrays
    q, k, v, g = (x.swapaxes(1, 2) for x in arrays)
    dtype = v.dtype
    q, k, g = (x.astype(jnp.float32) for x in (q, k, g))
    q *= scale
    scores, from_start, to_end = _scores(q, k, g, dtype)
    q *= jnp.exp(from_start)
    k *= jnp.exp(to_end)
    decay = jnp.exp(from_start[:, :, -1])
    if starts is not None:
        run = jnp.cumsum(starts, axis=1, dtype=jnp.int32)[:, None, :, None]
        last = run[:, :, -1:]
        scores = jnp.where(run == run.swapaxes(2, 3), scores, 0)
        q = jnp.where(run == 0, q, 0)
        k = jnp.where(run == last, k, 0)
        decay = jnp.where(last[:, :, 0] == 0, decay, 0)
    o = _dot("bhij,bhjv->bhiv", scores, v, dtype)
    new_state = _dot("bhjk,bhjv->bhkv", k, v, dtype)
    if state is not None:
        o += _dot("bhik,bhkv->bhiv", q, state, dtype)
        new_state += decay[..., None] * state
    return new_state, o.astype(dtype).swapaxes(1, 2)


def _scores(
    q: Float[Array, "b h c k"], k: Float[Array, "b h c k"], g: Float[Array, "b h c k"], dtype: jnp.dtype
) -> tuple[Float[Array, "b h c c"], Float[Array, "b h c k"], Float[Array, "b h c k"]]:
    """Decayed scores of all pairs j <= i, sums of g from the start to i, sums from j + 1 to the end."""
    batch, heads, tokens, width = q.shape
    scores = jnp.sum(q * k, axis=-1)[..., None, None]
    from_start = g[:, :, :, None]
    to_end = jnp.zeros_like(from_start)
    size = 1
    while size < tokens:
        blocks = (batch, heads, tokens // size, size, width)
        (scores_1, scores_2), (start_1, start_2), (end_1, end_2) = map(_pairs, (scores, from_start, to_end))
        queries = _pairs(q.reshape(blocks))[1] * jnp.exp(start_2)
        keys = _pairs(k.reshape(blocks))[0] * jnp.exp(end_1)
        cross = _dot("bhnik,bhnjk->bhnij", queries, keys, dtype)
        first = jnp.concatenate([scores_1, jnp.zeros_like(cross)], axis=-1)
        second = jnp.concatenate([cross, scores_2], axis=-1)
        scores = jnp.concatenate([first, second], axis=-2)
        from_start = jnp.concatenate([start_1, start_2 + start_1[..., -1:, :]], axis=-2)
        to_end = jnp.concatenate([end_1 + start_2[..., -1:, :], end_2], axis=-2)
        size *= 2
    return scores[:, :, 0], from_start[:, :, 0], to_end[:, :, 0]


def _pairs(x: Float[Array, "b h n c w"]) -> tuple[Float[Array, "b h m c w"], Float[Array, "b h m c w"]]:
    """The first and the second of every two neighbouring blocks."""
    return x[:, :, ::2], x[:, :, 1::2]


def _dot(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """A matrix product of operands in `dtype`, added up in float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jnp.einsum(
        equation, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def _pad(x: Shaped[Array, "b t *rest"], multiple: int) -> Shaped[Array, "b padded *rest"]:
    """Adds tokens of zeros at the end: without key and decay they leave the state as it is."""
    padding = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x


def _split(x: Shaped[Array, "b t *rest"], size: int) -> Shaped[Array, "n b c *rest"]:
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)
