"""`pallas_gla.gla` with the interface of flash-linear-attention (fla), for code ported from PyTorch.

    from fla.ops.gla import chunk_gla, fused_recurrent_gla       # before
    from pallas_gla.fla import chunk_gla, fused_recurrent_gla    # after

Arguments, layouts and results follow fla 0.6 (https://github.com/fla-org/flash-linear-attention, file
fla/ops/gla/chunk.py), with JAX arrays. Both functions run the same kernels. fla has no argument
`implementation`.
"""

from typing import Any, no_type_check

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pallas_gla import validation
from pallas_gla.api import gla


@no_type_check
def chunk_gla(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h k"],
    scale: float | None = None,
    initial_state: Float[Array, "n h _ _"] | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Int[Array, " n_plus_1"] | None = None,
    cu_seqlens_cpu: Int[np.ndarray, " n_plus_1"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "n h _ _"] | None]:
    """Gated linear attention with the interface of fla's ``chunk_gla``.

    Args:
        q, k, v, g, scale, implementation: as in :func:`pallas_gla.gla`.
        initial_state: one state per sequence, [N, H, K, V], in the dtype of ``q`` or float32. N is B without
            ``cu_seqlens``.
        output_final_state: whether to return the state after the last token of each sequence.
        state_v_first: whether states have the layout [N, H, V, K].
        cu_seqlens: offsets of N sequences that are concatenated along T, [N + 1], increasing from 0 to T; B
            must be 1. Sequence n is the tokens from cu_seqlens[n] up to cu_seqlens[n + 1]. Without states the
            sequences are segments of one scan, and the offsets may be traced. With states they run as a batch
            padded to the longest sequence, and the offsets must be concrete.
        cu_seqlens_cpu: the same offsets as a NumPy array, for calls in which ``cu_seqlens`` is traced.

    Returns:
        The output, [B, T, H, V] in the dtype of ``v``, and the final states in float32, or None if
        ``output_final_state`` is false.

    Raises:
        ValueError: if an argument has an invalid shape, dtype or value.
        NotImplementedError: if offsets are traced and states are used, or if the requested implementation
            does not support the call.
    """
    validation.check_qkvg(q, k, v, g)
    offsets = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    options = {"scale": scale, "implementation": implementation}
    return _scan((q, k, v, g), initial_state, output_final_state, state_v_first, offsets, options)


@no_type_check
def fused_recurrent_gla(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    gk: Float[Array, "b t h k"] | None = None,
    gv: None = None,
    scale: float | None = None,
    initial_state: Float[Array, "n h _ _"] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Int[Array, " n_plus_1"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "n h _ _"] | None]:
    """Gated linear attention with the interface of fla's ``fused_recurrent_gla``.

    Equals :func:`chunk_gla`, with a different order of arguments and an option to scan in reverse.

    Args:
        gk: log decay, ``g`` of :func:`chunk_gla`. None means no decay.
        gv: decay of the values, unsupported; must be None.
        reverse: whether to scan each sequence from its last token to its first.
        q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens, implementation: as in
            :func:`chunk_gla`.

    Returns:
        The output and the final states or None, as in :func:`chunk_gla`.

    Raises:
        ValueError: if an argument has an invalid shape, dtype or value.
        NotImplementedError: if ``gv`` is not None, and as in :func:`chunk_gla`.
    """
    if gv is not None:
        raise NotImplementedError(
            f"unsupported gv: got {type(gv).__name__}; expected None, because only keys decay (gk)"
        )
    if gk is None:
        validation.check_qkvg(q, k, v, q)
        gk = jnp.zeros_like(q)
    validation.check_qkvg(q, k, v, gk, gate_name="gk")
    options = {"scale": scale, "implementation": implementation, "reverse": bool(reverse)}
    return _scan((q, k, v, gk), initial_state, output_final_state, state_v_first, cu_seqlens, options)


def _scan(
    arrays: tuple,
    initial_state: Any,
    output_final_state: bool,
    state_v_first: bool,
    offsets: Any,
    options: dict,
) -> tuple:
    q, _, v, _ = arrays
    if offsets is not None:
        _check_offsets(offsets, q.shape)
    if initial_state is not None:
        sequences = q.shape[0] if offsets is None else len(offsets) - 1
        widths, layout = (q.shape[3], v.shape[3]), "[N, H, K, V]"
        if state_v_first:
            widths, layout = widths[::-1], "[N, H, V, K]"
        shape, dtypes = (sequences, q.shape[2], *widths), (str(q.dtype), "float32")
        validation.check_array("initial_state", initial_state, layout, shape, dtypes)
        initial_state = initial_state.swapaxes(2, 3) if state_v_first else initial_state
    options = options | {"initial_state": initial_state, "return_final_state": True}
    if offsets is None:
        o, final_state = gla(*arrays, **options)
    elif initial_state is None and not output_final_state:
        segments = jnp.searchsorted(jnp.asarray(offsets)[1:], jnp.arange(q.shape[1]), side="right")
        o, final_state = gla(*arrays, segment_ids=segments[None], **options)
    else:
        o, final_state = _padded(arrays, offsets, options)
    if not output_final_state:
        return o, None
    return o, final_state.swapaxes(2, 3) if state_v_first else final_state


def _padded(arrays: tuple, offsets: Any, options: dict) -> tuple:
    """Run the sequences as a batch. Zero tokens pad shorter sequences and keep their states."""
    if isinstance(offsets, Tracer):
        raise NotImplementedError(
            "unsupported cu_seqlens: got a traced array with initial_state or output_final_state; expected a"
            " NumPy array (chunk_gla also takes it as cu_seqlens_cpu), or a call without states"
        )
    offsets = np.asarray(offsets)
    lengths = np.diff(offsets)[:, None]
    place = np.arange(lengths.max())
    inside = place < lengths
    index = np.where(inside, offsets[:-1, None] + place, 0)
    batch = (jnp.where(inside[..., None, None], jnp.asarray(x)[0, index], 0) for x in arrays)
    o, final_state = gla(*batch, **options)
    return o[np.nonzero(inside)][None], final_state


def _check_offsets(offsets: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the offsets divide T into sequences. Traced values are not checked."""
    if shape[0] != 1:
        raise ValueError(f"invalid shape of q: got B = {shape[0]}; expected B = 1 with cu_seqlens")
    length = max(getattr(offsets, "size", 2), 2)
    validation.check_array("cu_seqlens", offsets, "[N + 1]", (length,), validation.INTEGERS)
    if isinstance(offsets, Tracer):
        return
    offsets = np.asarray(offsets)
    if offsets[0] != 0 or offsets[-1] != shape[1] or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(
            f"invalid cu_seqlens: got {offsets.tolist()}; expected increasing offsets from 0 to {shape[1]}"
        )
