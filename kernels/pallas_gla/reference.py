"""The GLA recurrence, one token after another in float32: the oracle of every other implementation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_gla.scan_order import segment_starts, to_raster_order, to_scan_order, zero_state


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
    """The recurrence of `pallas_gla.gla` exactly as it is written; `chunk_size` has no meaning here."""
    del chunk_size
    ids = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    starts = segment_starts(to_scan_order(ids, grid, direction))
    tokens = [to_scan_order(x, grid, direction).astype(jnp.float32) for x in (q, k, v, g)]

    def step(state, token):
        q_t, k_t, v_t, g_t, starts_t = token
        state = jnp.where(starts_t[:, None, None, None], 0, state)
        state = jnp.exp(g_t)[..., None] * state + k_t[..., None] * v_t[..., None, :]
        return state, scale * jnp.sum(q_t[..., None] * state, axis=-2)

    state = zero_state(k, v, g)
    if initial_state is not None:
        state += initial_state
    final_state, o = jax.lax.scan(step, state, [x.swapaxes(0, 1) for x in (*tokens, starts)])
    return to_raster_order(o.swapaxes(0, 1).astype(v.dtype), grid, direction), final_state
