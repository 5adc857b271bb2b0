"""GLA for TPUs, as Pallas (Mosaic) kernels: TPU v4, v5e, v5p, v6e and TPU7x.

Operands have the layouts [B, T, H * K] and [B, T, H * V], as matrix products produce them, in blocks of full
width. K is padded to 32, 64 or 128, V to 64 or 128, and T to full grid steps if necessary; DiG's shapes need
no padding. These chips have no float16, so it is computed in float32.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla import chip
from pallas_gla.mosaic_tpu import tuning
from pallas_gla.mosaic_tpu.backward import backward_kernel
from pallas_gla.mosaic_tpu.forward import forward_kernel
from pallas_gla.mosaic_tpu.launch import Launch, chip_dtype, starts_of_segments
from pallas_gla.mosaic_tpu.tangent import STATES, tangent_kernel
from pallas_gla.scan import Operands, Scan, saved_shape
from pallas_gla.validation import FLOATS, one_of

WIDTHS = (16, 128)
CHUNKS = (16, 32, 64, 128)
# They do not transpose bfloat16 in a matrix product, and their VMEM is too small for float32.
OLD_TPUS = ("TPU v2", "TPU v3")


def unsupported(operands: Operands, scan: Scan) -> str | None:
    """Return why these kernels do not support a scan, or None if they do."""
    for name, x in (("K", operands.q), ("V", operands.v)):
        if not WIDTHS[0] <= x.shape[-1] <= WIDTHS[1]:
            return f"unsupported {name}: got {x.shape[-1]}; expected {WIDTHS[0]} to {WIDTHS[1]}"
    if not scan.interpret and chip.current().kind in OLD_TPUS:
        return f"unsupported TPU: got {chip.current()}; expected v4 or later"
    if not scan.interpret and tuning.blocks().vmem_limit_bytes is None and operands.v.dtype != jnp.bfloat16:
        # They need more than v4's 16 MiB of VMEM, the default limit. An unknown chip may be a v4.
        return f"unsupported dtype of v on {chip.current()}: got {operands.v.dtype}; expected bfloat16"
    if str(operands.v.dtype) not in FLOATS:
        return f"unsupported dtype of v: got {operands.v.dtype}; expected {one_of(FLOATS)}"
    if scan.chunk_size is not None and scan.chunk_size not in CHUNKS:
        return f"unsupported chunk_size: got {scan.chunk_size}; expected {one_of((None, *CHUNKS))}"
    return None


def forward(
    operands: Operands, scan: Scan, *, save: bool
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """Run a scan (see `pallas_gla.dispatch`). Chunks longer than 64 leave the last saved states undefined."""
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
    """Return the gradients of a scan (see `pallas_gla.dispatch`)."""
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
    gradients = {name: launch.unpack(results[f"d_{name}"], getattr(operands, name)) for name in tokens}
    if operands.segment_ids is not None:
        gradients["g"] = jnp.where(
            starts_of_segments(operands.segment_ids, scan)[:, :, None, None], 0, gradients["g"]
        )
    if operands.norm_weight is not None:
        batch, values = operands.norm_weight.shape
        by_head = results["d_norm_weight"].reshape(batch, -1, launch.tiling.value_width)
        gradients["norm_weight"] = by_head.sum(1)[:, :values].astype(operands.norm_weight.dtype)
    if operands.initial_state is not None:
        gradients["initial_state"] = launch.unpack_state(results["d_initial_state"])
    return Operands(**gradients)


def tangent(
    operands: Operands, tangents: Operands, scan: Scan
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Return the tangents of a scan's results (see `pallas_gla.dispatch`)."""
    launch = Launch.of(operands, scan, tuning.blocks().backward_chunks)
    inputs = launch.inputs(operands)
    dots = {name: x for name, x in tangents._asdict().items() if x is not None}
    inputs |= {f"{name}_dot": launch.operand(name, x) for name, x in dots.items()}
    results = {"o_dot": launch.dtype, "final_state_dot": jnp.dtype(jnp.float32)}
    body = functools.partial(tangent_kernel, scale=scan.scale, gating=scan.gating)
    results = launch.run("gla_tangent", body, inputs, results, states=STATES)
    return launch.unpack(results["o_dot"], operands.v), launch.unpack_state(results["final_state_dot"])
