"""GLA for TPUs, as Pallas (Mosaic) kernels: TPU v4, v5e, v5p, v6e and TPU7x.

Operands go in as [B, T, H * K] and [B, T, H * V], which is how projections leave them, in blocks of whole
width. K is padded to 32, 64 or 128, V to 64 or 128, and T to whole grid steps, where it is anything else;
DiG's shapes need no padding. float16, which these chips lack, is computed in float32.

`launch` lays a scan out on the chip, `forward` and `backward` are the kernels.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla.mosaic_tpu import tuning
from pallas_gla.mosaic_tpu.backward import backward_kernel
from pallas_gla.mosaic_tpu.forward import forward_kernel
from pallas_gla.mosaic_tpu.launch import Launch, chip_dtype, starts_of_segments
from pallas_gla.scan import Operands, Scan, saved_shape

WIDTHS = (16, 128)
CHUNKS = (16, 32, 64, 128)


def unsupported(operands: Operands, scan: Scan) -> str | None:
    """Says why these kernels cannot run a scan, in one line; None if they can."""
    for name, x in (("K", operands.q), ("V", operands.v)):
        if not WIDTHS[0] <= x.shape[-1] <= WIDTHS[1]:
            return f"{name} must be from {WIDTHS[0]} to {WIDTHS[1]}, got {x.shape[-1]}"
    if str(operands.v.dtype) not in ("bfloat16", "float16", "float32"):
        return f"v must be bfloat16, float16 or float32, got {operands.v.dtype}"
    if scan.chunk_size is not None and scan.chunk_size not in CHUNKS:
        return f"chunk_size must be None or one of {', '.join(map(str, CHUNKS))}, got {scan.chunk_size}"
    return None


def forward(
    operands: Operands, scan: Scan, *, save: bool
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """Runs a scan (see `pallas_gla.scan`).

    Returns:
        o, [B, T, H, V] in the dtype of v; the final state, [B, H, K, V] in float32; and, with `save`, the
        states that enter the chunks, transposed and with heads side by side, [B, N, V, H * K]; chunks longer
        than 64 leave slots at the end undefined.
    """
    launch = Launch.of(operands, scan, tuning.blocks().forward_chunks)
    results = {"o": launch.dtype, "final_state": jnp.dtype(jnp.float32)}
    (_, slots, _, _), state_dtype = saved_shape(operands, scan)
    if save:
        results["states"] = jnp.dtype(state_dtype)
    body = functools.partial(forward_kernel, scale=scan.scale, gating=scan.gating)
    results = launch.run("gla_forward", body, launch.inputs(operands), results, slots)
    o = launch.unpack(results["o"], operands.v)
    states = launch.trim_states(results["states"], slots) if save else None
    return o, launch.unpack_state(results["final_state"]), states


def backward(
    operands: Operands,
    states: Float[Array, "b n v hk"],
    d_out: Float[Array, "b t h v"],
    d_final_state: Float[Array, "b h k v"],
    scan: Scan,
) -> Operands:
    """The gradients of a scan, each in its operand's dtype, from the states that `forward` saved.

    Args:
        operands, scan: those of the forward pass.
        states: what it saved.
        d_out, d_final_state: cotangents of its results, [B, T, H, V] in the dtype of v and [B, H, K, V] in
            float32.

    Returns:
        Gradients in the places of the operands; None where there is none.
    """
    launch = Launch.of(operands, scan, tuning.blocks().backward_chunks)
    inputs = launch.inputs(operands._replace(initial_state=None))
    inputs["d_o"] = launch.pack("d_o", d_out)
    inputs["d_final_state"] = launch.pack_state(d_final_state)
    inputs["states"] = launch.pad_states(states)
    tokens = [name for name in ("q", "k", "v", "g", "out_gate") if getattr(operands, name) is not None]
    results = {f"d_{name}": chip_dtype(getattr(operands, name).dtype) for name in tokens}
    results["d_initial_state"] = jnp.dtype(jnp.float32)
    if scan.gating is not None:
        results["d_norm_weight"] = jnp.dtype(jnp.float32)
    body = functools.partial(backward_kernel, scale=scan.scale, gating=scan.gating)
    results = launch.run("gla_backward", body, inputs, results, states.shape[1], backward=True)
    found = {name: launch.unpack(results[f"d_{name}"], getattr(operands, name)) for name in tokens}
    if operands.segment_ids is not None:
        found["g"] = jnp.where(starts_of_segments(operands, scan)[:, :, None, None], 0, found["g"])
    if scan.gating is not None:
        batch, values = operands.norm_weight.shape
        by_head = results["d_norm_weight"].reshape(batch, -1, launch.tiling.value_width)
        found["norm_weight"] = by_head.sum(1)[:, :values].astype(operands.norm_weight.dtype)
    if operands.initial_state is not None:
        found["initial_state"] = launch.unpack_state(results["d_initial_state"])
    return Operands(**found)
