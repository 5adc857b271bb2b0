"""The public functions: `gla`, `gla_2d` and `gated_gla_2d`.

`no_type_check` exempts them from runtime type checking: `validation.py` gives clearer errors.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_gla import context_parallel, dispatch, primitive, validation
from pallas_gla.scan import Gating, Operands, Scan


@no_type_check
def gla(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h k"],
    *,
    scale: float | Float[Array, "..."] | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Gated linear attention over a sequence.

    Computes, for every batch element and head, with a float32 state S of shape [K, V]::

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale * q_t S_t

    See Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (2024), eq. 3.

    Args:
        q, k: queries and keys, [B, T, H, K], in bfloat16, float16 or float32.
        v: values, [B, T, H, V], in the dtype of ``q``.
        g: natural logarithm of the decay, [B, T, H, K], finite and <= 0, in the dtype of ``q`` or float32.
            A value of -1e4 resets the state.
        scale: factor applied to the output: a number, or a real array with one number or one per head, [H],
            which may be traced and has a gradient. Default: K**-0.5.
        initial_state: S before the first token, [B, H, K, V], in the dtype of ``q`` or float32. Default:
            zeros.
        return_final_state: whether to also return S after the last token.
        reverse: whether to scan from the last token to the first. Equals flipping ``q``, ``k``, ``v`` and
            ``g`` along T and flipping the output back; the final state is then S after token 0.
        segment_ids: integers, [B, T]. The state is reset to zero wherever the id changes along the scan.
            ``initial_state`` enters the first segment visited; the final state leaves the last one.
        axis_name: name of a mesh axis that shards T, for calls inside :func:`jax.shard_map`. The arrays are
            this shard's tokens, ordered by axis index; the initial and final states belong to the full
            sequence.
        chunk_size: number of tokens per chunk, a power of two and at least 16. Default: chosen from shape
            and device.
        implementation: ``"triton"`` (a kernel for NVIDIA GPUs), ``"mosaic"`` (a kernel for TPUs, and an
            experimental one for Hopper GPUs), ``"xla"`` (plain JAX, in chunks) or ``"reference"`` (plain JAX,
            token by token). Default: the kernel of the chip that the program is compiled for, or ``"xla"`` if
            there is none or if it does not support the call.
        interpret: whether to run a Pallas kernel in interpret mode, which works on every platform.

    Returns:
        The output, [B, T, H, V] in the dtype of ``v``. If ``return_final_state`` is true, a pair of the
        output and the final state, [B, H, K, V] in float32.

    Raises:
        ValueError: if an argument has an invalid shape, dtype or value. If the environment variable
            PALLAS_GLA_DEBUG is 1, also for non-finite inputs and for g > 0.
        NotImplementedError: if the requested implementation does not support the call.
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
    scale: float | Float[Array, "..."] | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_final_state: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Gated linear attention over an image, in one of four scan directions.

    The directions are DiG's (Zhu et al. 2025, section 3.3). Equals :func:`gla` with the tokens visited in the
    order of ``direction``. All arrays stay in raster order (row by row), whatever the direction.

    Args:
        q, k, v, g: as in :func:`gla`, with T = rows * columns.
        grid: number of rows and of columns, (rows, columns).
        direction: ``"row"`` visits (0, 0), (0, 1), ...; ``"column"`` visits (0, 0), (1, 0), ...;
            ``"row_reversed"`` and ``"column_reversed"`` visit the same tokens from last to first.
        scale, initial_state, return_final_state, segment_ids, chunk_size, implementation, interpret: as in
            :func:`gla`.
        axis_name: as in :func:`gla`. The mesh axis shards the rows of the image, and ``grid`` describes this
            shard. In the column directions the axis size must divide the number of columns.

    Returns:
        The output, [B, T, H, V] in the dtype of ``v``. If ``return_final_state`` is true, a pair of the
        output and the state after the last token visited, [B, H, K, V] in float32.

    Raises:
        ValueError: if an argument has an invalid shape, dtype or value, as in :func:`gla`.
        NotImplementedError: if the requested implementation does not support the call.
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
    scale: float | Float[Array, "..."] | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_final_state: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    axis_name: str | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    interpret: bool | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Gated linear attention over an image, with decay logits, per-head RMSNorm and an output gate.

    Computes, in float32::

        g = logsigmoid(gate_logits) / gate_normalizer
        out = RMSNorm(gla_2d(q, k, v, g)) * norm_weight * SiLU(out_gate)

    where RMSNorm normalizes every head over V. See Yang et al. (2024), section 4.4.

    Args:
        q, k, v, grid, direction: as in :func:`gla_2d`.
        gate_logits: logits of the decay, [B, T, H, K], in the dtype of ``q`` or float32. At logits of 0 the
            state halves every ``gate_normalizer`` tokens.
        out_gate: logits of the output gate, [B, T, H, V], in the dtype of ``q`` or float32.
        norm_weight: weight of the RMSNorm, [V], shared by all heads, in the dtype of ``q`` or float32.
        gate_normalizer: divisor of the log decay, > 0.
        eps: added to the mean square in the RMSNorm, > 0.
        scale, initial_state, return_final_state, segment_ids, axis_name: as in :func:`gla_2d`.
        chunk_size, implementation, interpret: as in :func:`gla`.

    Returns:
        The output, [B, T, H, V] in the dtype of ``v``. If ``return_final_state`` is true, a pair of the
        output and the state after the last token visited, [B, H, K, V] in float32.

    Raises:
        ValueError: if an argument has an invalid shape, dtype or value, as in :func:`gla`.
        NotImplementedError: if the requested implementation does not support the call.
    """
    validation.check_qkvg(q, k, v, gate_logits, gate_name="gate_logits")
    accepted = (str(q.dtype), "float32")
    validation.check_array("out_gate", out_gate, "[B, T, H, V]", v.shape, accepted)
    validation.check_array("norm_weight", norm_weight, "[V]", v.shape[3:], accepted)
    validation.check_positive("gate_normalizer", gate_normalizer)
    validation.check_positive("eps", eps)
    # One row per batch element, because every operand is sharded and mapped over by its first axis. In
    # float32, because its gradient sums over all tokens.
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
    """Return the output and the final state of `gla_2d` (`gating` is None) or `gated_gla_2d`."""
    q, _, v, *_ = operands
    grid = validation.check_grid(grid, direction, q.shape[1])
    validation.check_options(q, v, scale, operands.initial_state, operands.segment_ids, chunk_size)
    dispatch.check(implementation, interpret)
    operands = Operands(*(None if x is None else jnp.asarray(x) for x in operands))
    if validation.debug_checks_enabled():
        validation.check_values(operands, gated=gating is not None)
    if isinstance(scale, jax.Array | np.ndarray):
        # In float32, so that q is rounded once.
        scaled = operands.q.astype(jnp.float32) * jnp.reshape(scale, (1, 1, -1, 1)).astype(jnp.float32)
        operands, scale = operands._replace(q=scaled.astype(q.dtype)), 1.0
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
            return primitive.run(operands, scan, implementation)

    if axis_name is None:
        return run(operands, scan)
    validation.check_axis(axis_name, grid, direction)
    return context_parallel.forward(run, operands, scan, axis_name)
