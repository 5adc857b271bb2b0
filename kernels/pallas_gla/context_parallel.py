"""One scan over a sequence whose tokens are split over the devices of a mesh axis.

A shard turns the state that enters it into S_out = diag(exp(sum of g)) S_in + S_local. Each one computes its
S_local and its factor, without any output; all gather these summaries (K * V + K numbers per head, whatever
the length), fold those of the shards before them, and run the ordinary scan from the state they then know.
(The all-gather of states is that of LASP-2, Sun et al. 2025; here with a decay.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.scan_order import segment_starts, zero_state


def forward(
    scan: Callable,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h k"],
    *,
    axis_name: str,
    initial_state: Float[Array, "b h k v"] | None,
    segment_ids: Int[Array, "b t"] | None,
    direction: str,
    **options,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Runs `scan` (see `pallas_gla.backends`) over this shard's tokens as a part of the whole sequence.

    Args:
        scan: `forward` of an implementation.
        q, k, v, g, segment_ids: this shard's part, in the order of the axis index.
        axis_name: mesh axis of the enclosing `jax.shard_map`.
        initial_state: of the whole sequence, the same on every shard.
        direction: a row direction; the reversed one starts at the last token of the last shard.
        **options: of `scan`.

    Returns:
        This shard's o and the final state of the whole sequence, the same on every shard.
    """
    reverse = direction == "row_reversed"
    index, last = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name) - 1
    position = last - index if reverse else index
    starts = None
    if segment_ids is not None:
        ids = jnp.flip(segment_ids, axis=1) if reverse else segment_ids
        starts = segment_starts(ids).at[:, 0].set(_differs_from_previous(ids, position, axis_name, reverse))
    state, factor = _summary(*(jnp.flip(x, axis=1) if reverse else x for x in (k, v, g)), starts)

    def fold(incoming, shard):
        state, factor = shard
        return factor[..., None] * incoming + state, incoming

    start = zero_state(k, v, g)
    if initial_state is not None:
        start += initial_state
    summaries = jax.lax.all_gather((state, factor), axis_name)
    _, incoming = jax.lax.scan(fold, start, summaries, reverse=reverse)
    incoming = jax.lax.dynamic_index_in_dim(incoming, index, keepdims=False)
    if starts is not None:
        incoming = jnp.where(starts[:, 0, None, None, None], 0, incoming)
    o, final_state = scan(
        q, k, v, g, initial_state=incoming, segment_ids=segment_ids, direction=direction, **options
    )
    return o, jax.lax.psum(jnp.where(position == last, final_state, 0), axis_name)


@jax.checkpoint
def _summary(
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h k"],
    starts: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b h k v"], Float[Array, "b h k"]]:
    """The state that tokens in scan order leave behind, and the factor of the state that entered."""
    decay_from = jax.lax.cumsum(g.astype(jnp.float32), axis=1, reverse=True)
    factor = jnp.exp(decay_from[:, 0])
    later = jnp.concatenate([decay_from[:, 1:], jnp.zeros_like(decay_from[:, :1])], axis=1)
    keys = k.astype(jnp.float32) * jnp.exp(later)
    if starts is not None:
        run = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
        keys = jnp.where((run == run[:, -1:])[:, :, None, None], keys, 0)
        factor = jnp.where((run[:, -1] == 0)[:, None, None], factor, 0)
    state = jnp.einsum("bthk,bthv->bhkv", keys, v.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return state, factor


def _differs_from_previous(
    ids: Int[Array, "b t"], position: Int[Array, ""], axis_name: str, reverse: bool
) -> Bool[Array, " b"]:
    """Whether this shard's first id, in scan order, differs from the last one of the shard before it."""
    size = jax.lax.axis_size(axis_name)
    step = -1 if reverse else 1
    neighbours = [(i, i + step) for i in range(size) if 0 <= i + step < size]
    previous = jax.lax.ppermute(ids[:, -1], axis_name, neighbours)
    return (position > 0) & (ids[:, 0] != previous)
