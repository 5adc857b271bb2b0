"""The public functions: `gla`, `gla_2d` and `gated_gla_2d`.

Their annotations are exempt from run-time type checking (`no_type_check`), because bad arguments get an error
that says what is accepted (`validation.py`).
"""

from typing import no_type_check

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_gla import context_parallel, dispatch, primitive, sharding, validation
from pallas_gla.scan import Gating, Operands, Scan


@no_type_check
def gla(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h k"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Gated linear attention: a linear recurrence over tokens with a decay per channel.

    For every batch element and head, with a state S of K x V in float32,

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale * q_t S_t

    (Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024, equation 3.)

    Args:
        q, k: queries and keys, [B, T, H, K] in bfloat16, float16 or float32.
        v: values, [B, T, H, V] in the dtype of q.
        g: natural logarithm of the decay, <= 0 and finite (-1e4 is a reset), in the dtype of q or float32.
        scale: factor of o, K**-0.5 by default.
        initial_state: S before the first token, [B, H, K, V] in the dtype of q or float32; default zero.
        return_final_state: also return S after the last token visited.
        reverse: scan from the last token to the first; equals flipping q, k, v, g along T and o back.
        segment_ids: [B, T]; S is set to zero where the id differs from that of the token visited before.
            The initial state enters the first segment visited, the final state leaves the last one.
        axis_name: mesh axis over which T is split, inside `jax.shard_map`: the arrays are this shard's part
            in the order of the axis index; initial and final state are those of the whole sequence.
        chunk_size: tokens processed at once, a power of two >= 16; chosen by shape and device by default.
        implementation: "xla" (chunked), "reference" (token by token), or None for the best one.
        interpret: runs a Pallas kernel in interpret mode.

    Returns:
        o, [B, T, H, V] in the dtype of v; with `return_final_state` also S in float32.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value. With PALLAS_GLA_DEBUG=1 in the environment
            also for non-finite input and for g > 0.
        NotImplementedError: the named implementation cannot run this.
    """
    validation.check_qkvg(q, k, v, g)
    return gla_2d(
        q,
        k,
        v,
        g,
        grid=(1, q.shape[1]),
        direction="row_reversed" if reverse else "row",
        scale=scale,
        initial_state=initial_state,
        return_final_state=return_final_state,
        segment_ids=segment_ids,
        axis_name=axis_name,
        chunk_size=chunk_size,
        implementation=implementation,
        interpret=interpret,
    )


@no_type_check
def gla_2d(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h k"],
    *,
    grid: tuple[int, int],
    direction: str = "row",
    scale: float | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_final_state: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """`gla` over the tokens of an image, which stay in raster order (row by row) whatever the direction.

    Args:
        q, k, v, g: as in `gla`, with T = rows * columns.
        grid: (rows, columns).
        direction: "row" visits (0, 0), (0, 1), ...; "column" visits (0, 0), (1, 0), ...; "row_reversed" and
            "column_reversed" visit the same tokens from the last to the first.
        segment_ids: as in `gla`, in raster order too.
        axis_name: as in `gla`: this shard's rows. Only for the row directions.
        scale, initial_state, return_final_state, chunk_size, implementation, interpret: as in `gla`.

    Returns:
        o in raster order, [B, T, H, V] in the dtype of v; with `return_final_state` also the state after the
        last token visited.

    Raises:
        ValueError, NotImplementedError: as `gla`.
    """
    validation.check_qkvg(q, k, v, g)
    operands = Operands(q, k, v, g, initial_state=initial_state, segment_ids=segment_ids)
    out, final_state = _run(
        operands, None, grid, direction, scale, chunk_size, axis_name, implementation, interpret
    )
    return (out, final_state) if return_final_state else out


@no_type_check
def gated_gla_2d(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    gate_logits: Float[Array, "b t h k"],
    out_gate: Float[Array, "b t h v"],
    norm_weight: Float[Array, " v"],
    *,
    grid: tuple[int, int],
    direction: str = "row",
    gate_normalizer: float = 16,
    eps: float = 1e-6,
    scale: float | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_final_state: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """The whole core of a GLA mixer: decay from logits, `gla_2d`, normalisation per head and output gate.

        g = logsigmoid(gate_logits) / gate_normalizer
        out = RMSNorm(gla_2d(q, k, v, g)) * norm_weight * SiLU(out_gate)

    in float32 (Yang et al. 2024, section 4.4). At logits of 0 the state halves in `gate_normalizer` tokens.

    Args:
        q, k, v, grid, direction, return_final_state: as in `gla_2d`.
        gate_logits: [B, T, H, K], in the dtype of q or float32.
        out_gate: [B, T, H, V], in the dtype of q or float32.
        norm_weight: [V], in the dtype of q or float32; shared by all heads.
        gate_normalizer: > 0.
        eps: > 0, added to the mean square over V.
        scale, initial_state, segment_ids, axis_name, chunk_size, implementation, interpret: as in `gla_2d`.

    Returns:
        out, [B, T, H, V] in the dtype of v; with `return_final_state` also the state, as `gla_2d`.

    Raises:
        ValueError, NotImplementedError: as `gla`.
    """
    validation.check_qkvg(q, k, v, gate_logits, gate_name="gate_logits")
    accepted = (str(q.dtype), "float32")
    validation.check_array("out_gate", out_gate, "[B, T, H, V] of v", v.shape, accepted)
    validation.check_array("norm_weight", norm_weight, "[V]", v.shape[3:], accepted)
    validation.check_positive("gate_normalizer", gate_normalizer)
    validation.check_positive("eps", eps)
    # One row of the weight per batch element: every operand is split, and mapped over, by its first axis.
    # In float32, because its gradient is a sum over all tokens.
    norm_weight = jnp.broadcast_to(jnp.asarray(norm_weight, jnp.float32), (v.shape[0], v.shape[3]))
    operands = Operands(q, k, v, gate_logits, out_gate, norm_weight, initial_state, segment_ids)
    gating = Gating(float(gate_normalizer), float(eps))
    out, final_state = _run(
        operands, gating, grid, direction, scale, chunk_size, axis_name, implementation, interpret
    )
    return (out, final_state) if return_final_state else out


@no_type_check
def _run(
    operands: Operands,
    gating: Gating | None,
    grid: tuple[int, int],
    direction: str,
    scale: float | None,
    chunk_size: int | None,
    axis_name: str | None,
    implementation: str | None,
    interpret: bool | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Output and final state; what `gla_2d` and `gated_gla_2d` have in common."""
    q, _, v, *_ = operands
    grid = validation.check_grid(grid, direction, q.shape[1])
    validation.check_options(q, v, scale, operands.initial_state, operands.segment_ids, chunk_size)
    dispatch.check(implementation, interpret)
    operands = Operands(*(None if x is None else jnp.asarray(x) for x in operands))
    if validation.debug_checks_enabled():
        validation.check_values(operands, gated=gating is not None)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    scan = Scan(scale, grid, direction, chunk_size, gating, bool(interpret))
    if operands.initial_state is not None:
        operands = operands._replace(initial_state=operands.initial_state.astype(jnp.float32))
    if implementation in dispatch.PLAIN:
        forward = dispatch.plain(implementation).forward

        def run(operands: Operands, scan: Scan) -> tuple:
            return forward(operands, scan)[:2]
    else:

        def run(operands: Operands, scan: Scan) -> tuple:
            return sharding.per_shard(lambda part: primitive.run(part, scan, implementation), operands)

    if axis_name is None:
        return run(operands, scan)
    validation.check_axis(axis_name, grid, direction)
    return context_parallel.forward(run, operands, scan, axis_name)
