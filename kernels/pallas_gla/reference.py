"""The GLA recurrence, token by token in float32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla.gating import gated_output, log_decay
from pallas_gla.scan import Operands, Scan
from pallas_gla.scan_order import segment_starts, to_raster_order, to_scan_order, zero_state


@functools.partial(jax.jit, static_argnames="scan")
def forward(operands: Operands, scan: Scan) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Run the recurrence in the docstring of `pallas_gla.gla`. Ignores `chunk_size`."""
    q, k, v, g, out_gate, norm_weight, initial_state, segment_ids = operands
    if scan.gating:
        g = log_decay(g, scan.gating)
    starts = None
    if segment_ids is not None:
        starts = segment_starts(to_scan_order(segment_ids, scan.grid, scan.direction)).swapaxes(0, 1)
    tokens = [to_scan_order(x, scan.grid, scan.direction).astype(jnp.float32) for x in (q, k, v, g)]

    def step(state, token):
        q_t, k_t, v_t, g_t, starts_t = token
        if starts_t is not None:
            state = jnp.where(starts_t[:, None, None, None], 0, state)
        state = jnp.exp(g_t)[..., None] * state + k_t[..., None] * v_t[..., None, :]
        return state, scan.scale * jnp.sum(q_t[..., None] * state, axis=-2)

    state = zero_state(k, v, g)
    if initial_state is not None:
        state += initial_state
    final_state, o = jax.lax.scan(step, state, (*(x.swapaxes(0, 1) for x in tokens), starts))
    o = to_raster_order(o.swapaxes(0, 1), scan.grid, scan.direction)
    if scan.gating:
        assert out_gate is not None and norm_weight is not None
        o = gated_output(o, out_gate, norm_weight[:, None, None], scan.gating)
    return o.astype(v.dtype), final_state
