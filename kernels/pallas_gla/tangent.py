"""The tangent of a scan by other scans.

A dot marks a tangent, all sums follow the scan, and c_i is the sum of the decays g up to token i:

    o_i = scale (sum_{j <= i} (q_i exp(c_i - c_j) k_j) v_j + q_i exp(c_i) S_0)

The decay's tangent enters only through D_i, the sum of g_dot up to i, because the derivative of
exp(c_i - c_j) is exp(c_i - c_j) (D_i - D_j). Splitting the difference between query and key gives two scans,
the first with keys of 2K channels:

    o_dot   = GLA([q_dot + q D, q], [k, k_dot - k D], v; [g, g], [S_0, S_0_dot]) + GLA(q, k, v_dot; g)
    S_T_dot = D_T S_T + P_T + (the second scan's final state)

where [S_T, P_T] is the first scan's final state. So:

- All scans have the same `scale`, and D has none.
- Subtracting a constant c from D is exact with S_0_dot + c S_0 and (D_T - c) S_T. D is taken relative to its
  middle, which halves the rounding of q D and k D.
- A reset or a new segment zeroes both halves of the state, so D may run through it.
- A reversed scan and a scan along columns sum D in their own order, along the axes of the grid.

In 16 bits the rounding of q D and k D does not cancel where D is much larger than its differences within the
state's memory. `by_scans` therefore computes scans with D in float32. The kernels compute a tangent in one
launch instead, and restart D in every chunk: the state that enters the next one is S_dot + D S. `by_scans`
is for derivatives of a tangent, because it is a function of scans, which have derivatives of every order.
"""

from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla.gating import gated_output, log_decay
from pallas_gla.scan import Operands, Scan, ungated
from pallas_gla.scan_order import zero_state

# The widest keys of the kernels; wider doubled keys take two scans.
WIDEST_KEYS = 128
Results = tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]
Run = Callable[[Operands, Scan], Results]


def by_kernel(kernel: ModuleType, operands: Operands, tangents: Operands, scan: Scan) -> Results | None:
    """Return the tangents of a scan by a kernel, or None if it has none (see `pallas_gla.dispatch`)."""
    moving = {name for name, x in tangents._asdict().items() if x is not None}
    if scan.gating is None and moving <= {"v", "initial_state"}:
        # Linear in both.
        v = jnp.zeros_like(operands.v) if tangents.v is None else tangents.v
        operands = operands._replace(v=v, initial_state=tangents.initial_state)
        return kernel.forward(operands, scan, save=False)[:2]
    return kernel.tangent(operands, tangents, scan)


def by_scans(run: Run, operands: Operands, tangents: Operands, scan: Scan) -> Results:
    """Return the tangents of a scan's output and final state.

    Args:
        run: runs a scan.
        operands: the scan's operands.
        tangents: the operands' tangents; None for zero.
        scan: the scan's options.
    """
    if scan.gating is None:
        return _scan_tangent(run, operands, tangents, scan)
    gating = scan.gating
    operands, out_gate, weight = _without_gates(operands)
    tangents, out_gate_dot, weight_dot = _without_gates(tangents)

    def decay(logits: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        return log_decay(logits, gating)

    if tangents.g is None:
        g, g_dot = decay(operands.g), None
    else:
        g, g_dot = jax.jvp(decay, (operands.g,), (tangents.g,))
    operands, tangents, scan = operands._replace(g=g), tangents._replace(g=g_dot), ungated(scan)
    o, _ = run(operands, scan)
    o_dot, state_dot = _scan_tangent(run, operands, tangents, scan)
    primals, dots = (o, out_gate, weight), (o_dot, out_gate_dot, weight_dot)

    def output(*arrays: Float[Array, "..."]) -> Float[Array, "b t h v"]:
        o, out_gate, weight = arrays
        return gated_output(o, out_gate, weight[:, None, None], gating).astype(o.dtype)

    dots = (jnp.zeros_like(x) if dot is None else dot for x, dot in zip(primals, dots, strict=True))
    return jax.jvp(output, primals, tuple(dots))[1], state_dot


def _without_gates(operands: Operands) -> tuple:
    """Return the operands without the output's gate and norm, and these two."""
    return operands._replace(out_gate=None, norm_weight=None), operands.out_gate, operands.norm_weight


def _scan_tangent(run: Run, operands: Operands, tangents: Operands, scan: Scan) -> Results:
    """Return the tangents of a scan without gates."""
    v = operands.v
    parts = []
    keys_move = any(x is not None for x in (tangents.q, tangents.k, tangents.g))
    if keys_move:
        parts.append(_with_moving_keys(run, operands, tangents, scan))
    if tangents.v is not None or (tangents.initial_state is not None and not keys_move):
        v_dot = jnp.zeros_like(v) if tangents.v is None else tangents.v
        start = None if keys_move else tangents.initial_state
        parts.append(run(operands._replace(v=v_dot, initial_state=start), scan))
    o, state = jnp.zeros_like(v, jnp.float32), zero_state(operands.k, v, operands.g)
    for part in parts:
        o, state = o + part[0].astype(jnp.float32), state + part[1]
    return o.astype(v.dtype), state


def _with_moving_keys(run: Run, operands: Operands, tangents: Operands, scan: Scan) -> Results:
    """Return the part of the tangents that has the values v: all but that of v_dot."""
    dtype = operands.v.dtype if tangents.g is None else jnp.float32
    q, k, v = (x.astype(dtype) for x in (operands.q, operands.k, operands.v))
    q_dot, k_dot = (jnp.zeros_like(q) if x is None else x.astype(dtype) for x in (tangents.q, tangents.k))
    start, start_dot = operands.initial_state, tangents.initial_state
    total = None
    if tangents.g is not None:
        sums, total, middle = _centered_sums(tangents.g, scan)
        q_dot, k_dot = q_dot + q * sums, k_dot - k * sums
        if start is not None:
            start_dot = middle[..., None] * start + (0.0 if start_dot is None else start_dot)
    operands = operands._replace(g=operands.g.astype(jnp.promote_types(operands.g.dtype, dtype)))
    key = operands._replace(q=q_dot, k=k, v=v, initial_state=start)
    query = operands._replace(q=q, k=k_dot, v=v, initial_state=start_dot)
    o, final_state, final_dot = _sum_of_two(run, key, query, scan)
    if total is not None:
        final_dot += total[..., None] * final_state
    return o, final_dot


def _sum_of_two(run: Run, one: Operands, two: Operands, scan: Scan) -> tuple[Array, Array, Array]:
    """Return the sum of the outputs of two scans with the same values, and both final states."""
    width = one.k.shape[3]
    if 2 * width > WIDEST_KEYS:
        (o_1, state_1), (o_2, state_2) = run(one, scan), run(two, scan)
        return o_1.astype(jnp.float32) + o_2.astype(jnp.float32), state_1, state_2
    starts = [one.initial_state, two.initial_state]
    if any(x is not None for x in starts):
        like = next(x for x in starts if x is not None)
        starts = jnp.concatenate([jnp.zeros_like(like) if x is None else x for x in starts], axis=2)
    else:
        starts = None
    q, k, g = (jnp.concatenate(pair, axis=3) for pair in ((one.q, two.q), (one.k, two.k), (one.g, two.g)))
    o, state = run(one._replace(q=q, k=k, g=g, initial_state=starts), scan)
    return o.astype(jnp.float32), state[:, :, :width], state[:, :, width:]


def _centered_sums(
    g_dot: Float[Array, "b t h k"], scan: Scan
) -> tuple[Float[Array, "b t h k"], Float[Array, "b h k"], Float[Array, "b h k"]]:
    """Return the sums D of g_dot along the scan and their last value, relative to the middle, and the middle.

    The middle is the mean of the smallest and the largest value.
    """
    # Sum along the grid's axes: inside each line of the scan, then over the lines before it.
    line, across = (1, 2) if scan.by_columns else (2, 1)
    x = g_dot.astype(jnp.float32).reshape(g_dot.shape[0], *scan.grid, *g_dot.shape[2:])
    lines = x.sum(line, keepdims=True)
    before = jax.lax.cumsum(lines, across, reverse=scan.reverse) - lines
    sums = jax.lax.cumsum(x, line, reverse=scan.reverse) + before
    sums = sums.reshape(g_dot.shape)
    # As a reference any constant is exact; it needs no derivative.
    fixed = jax.lax.stop_gradient(sums)
    middle = (fixed.max(1) + fixed.min(1)) / 2
    return sums - middle[:, None], lines.sum((1, 2)) - middle, middle
