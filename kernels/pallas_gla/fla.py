"""`pallas_gla.gla` under the names of flash-linear-attention (fla), for code that comes from PyTorch.

    from fla.ops.gla import chunk_gla, fused_recurrent_gla       # before
    from pallas_gla.fla import chunk_gla, fused_recurrent_gla    # after

Arguments, layouts and results are those of fla 0.6 (https://github.com/fla-org/flash-linear-attention, file
fla/ops/gla/chunk.py), on JAX arrays. Both functions run the same kernels; `implementation` is an addition.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
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
    """fla's `chunk_gla`.

    Args:
        q, k, v, g, scale, implementation: as in `pallas_gla.gla`.
        initial_state: [N, H, K, V] in the dtype of q or float32, one state for each of the N sequences; N is
            B where there are no `cu_seqlens`.
        output_final_state: also return the states after the last token of each sequence.
        state_v_first: states come and go as [N, H, V, K].
        cu_seqlens: N sequences lie one after another along T, and B is 1; sequence n holds the tokens from
            cu_seqlens[n] up to cu_seqlens[n + 1], which rise from 0 to T. Without states the sequences are
            segments of one scan, and the offsets may be traced. With states they run as a batch, padded to
            the longest, and the offsets must be known when the call is traced.
        cu_seqlens_cpu: the same offsets as a NumPy array, where `cu_seqlens` is traced.

    Returns:
        o, [B, T, H, V] in the dtype of v, and the final states in float32, or None if not asked for.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value.
        NotImplementedError: traced offsets with states; or the named implementation cannot run this.
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
    """fla's `fused_recurrent_gla`: `chunk_gla` with another order of arguments and a reverse scan.

    Args:
        gk: the log decay `g` of `chunk_gla`; None is no decay.
        gv: decay of the values, which must be None.
        reverse: scan each sequence from its last token to its first.
        q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens, implementation: as in
            `chunk_gla`.

    Returns:
        As `chunk_gla`.

    Raises:
        ValueError, NotImplementedError: as `chunk_gla`; `gv` is not None.
    """
    if gv is not None:
        raise NotImplementedError(f"gv must be None (only K decays, by gk), got {type(gv).__name__}")
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
        widths, meaning = (q.shape[3], v.shape[3]), "[N, H, K, V]"
        if state_v_first:
            widths, meaning = widths[::-1], "[N, H, V, K]"
        shape, dtypes = (sequences, q.shape[2], *widths), (str(q.dtype), "float32")
        validation.check_array("initial_state", initial_state, meaning, shape, dtypes)
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
    """Runs the sequences as a batch; tokens of zeros behind the shorter ones leave their states alone."""
    if isinstance(offsets, jax.core.Tracer):
        raise NotImplementedError(
            "cu_seqlens is traced, and initial_state or output_final_state is given: pass the offsets as a"
            " NumPy array (in chunk_gla as cu_seqlens_cpu beside the traced one), or call without states"
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
    """Raises ValueError unless they divide T into sequences; traced ones are checked for shape and dtype."""
    if shape[0] != 1:
        raise ValueError(f"q has B = {shape[0]}, accepted with cu_seqlens is B = 1: sequences joined along T")
    length = max(getattr(offsets, "size", 2), 2)
    validation.check_array("cu_seqlens", offsets, "[N + 1]", (length,), validation.INTEGERS)
    if isinstance(offsets, jax.core.Tracer):
        return
    offsets = np.asarray(offsets)
    if offsets[0] != 0 or offsets[-1] != shape[1] or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"cu_seqlens must rise from 0 to T = {shape[1]}, got {offsets.tolist()}")
