"""GLA for NVIDIA GPUs from sm_80, as Pallas (Triton) kernels.

Operands keep their layout, [B, T, H, K] and [B, T, H, V], in every direction: each program computes the
addresses of its tokens. Forward and backward take one launch each, two for the backward of a gated scan, and
more for float32 gradients of wide values (see `GpuTuning.float32_values`). If
batch and heads give too few programs for the GPU, a long scan is split along T, which adds a launch to each.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

from pallas_gla import chip
from pallas_gla.scan import STATE_INTERVAL, Operands, Scan, saved_shape
from pallas_gla.scan_order import segment_starts, to_scan_order
from pallas_gla.triton import call, tuning
from pallas_gla.triton.backward import backward_kernel, backward_parts_kernel, ungate_kernel
from pallas_gla.triton.forward import forward_kernel, parts_kernel
from pallas_gla.triton.tangent import tangent_kernel, tangent_parts_kernel
from pallas_gla.triton.tiling import LARGEST_STATE, SHORTEST_CHUNK, TritonTiling
from pallas_gla.validation import one_of

WIDTHS = (16, 128)
DTYPES = ("bfloat16", "float16", "float32")
# The compute capability from which XLA compiles Triton kernels.
OLDEST_GPU = (8, 0)
# Compute capabilities with 99 KiB of shared memory, too little for a backward pass with wide keys and values.
SMALL_GPUS = ((8, 6), (8, 9), (12, 0), (12, 1))
# Shape and dtype of a result.
Result = tuple[tuple[int, ...], Any]


def unsupported(operands: Operands, scan: Scan) -> str | None:
    """Return why these kernels do not support a scan, or None if they do."""
    if not call.available:
        return f"unsupported jax: got {jax.__version__}; expected a version with Pallas's Triton backend"
    gpu = chip.current()
    if not scan.interpret and gpu.compute_capability is not None and gpu.compute_capability < OLDEST_GPU:
        return f"unsupported GPU: got {gpu}; expected sm_80 (Ampere) or later"
    widths = operands.q.shape[-1], operands.v.shape[-1]
    if not scan.interpret and gpu.compute_capability in SMALL_GPUS and min(widths) > 64:
        return f"unsupported K, V on {gpu}: got {widths}; expected at most 64 for one of them"
    for name, x in (("K", operands.q), ("V", operands.v)):
        if not WIDTHS[0] <= x.shape[-1] <= WIDTHS[1]:
            return f"unsupported {name}: got {x.shape[-1]}; expected {WIDTHS[0]} to {WIDTHS[1]}"
    if str(operands.v.dtype) not in DTYPES:
        return f"unsupported dtype of v: got {operands.v.dtype}; expected {one_of(DTYPES)}"
    size = scan.chunk_size
    if size is not None and (size < SHORTEST_CHUNK or size & (size - 1)):
        return f"unsupported chunk_size: got {size}; expected None or a power of two >= {SHORTEST_CHUNK}"
    rows = math.prod(operands.v.shape[:3]) * operands.v.shape[3]
    if rows >= 2**31:
        return f"unsupported size: got B * T * H * V = {rows}; expected less than 2**31"
    return None


def forward(
    operands: Operands, scan: Scan, *, save: bool
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """Run a scan (see `pallas_gla.dispatch`)."""
    tiling, arrays = _prepare(operands, scan)
    if tiling.parts > 1:
        inputs = {name: arrays[name] for name in ("k", "v", "g", "segments") if name in arrays}
        arrays |= _launch(parts_kernel, tiling, inputs, _part_results(tiling), programs=3)
    results = {"o": _like(arrays["v"]), "final_state": _end_state(tiling)}
    states, dtype = saved_shape(operands, scan)
    if save:
        results["states"] = ((math.prod(states[:3]), states[3]), dtype)
    results = _launch(forward_kernel, tiling, arrays, results, programs=3)
    final_state = results["final_state"].reshape(tiling.batch, tiling.heads, tiling.keys, tiling.values)
    return (
        results["o"].reshape(operands.v.shape),
        final_state,
        results["states"].reshape(states) if save else None,
    )


def backward(
    operands: Operands,
    states: Float[Array, "b n v hk"],
    d_out: Float[Array, "b t h v"],
    d_final_state: Float[Array, "b h k v"],
    scan: Scan,
) -> Operands:
    """Return the gradients of a scan (see `pallas_gla.dispatch`)."""
    tiling, arrays = _prepare(operands, scan)
    arrays.pop("initial_state", None)
    arrays["states"] = states.reshape(-1, states.shape[3])
    gradients = {}
    if scan.gating is None:
        arrays["d_o"] = _flat(d_out)
    else:
        assert operands.norm_weight is not None
        # Not float16, which a gradient may overflow.
        d_o = (arrays["v"].shape, states.dtype)
        results = {"d_o": d_o, "d_out_gate": _like(arrays["out_gate"])}
        device = _tuning(scan)
        short = dataclasses.replace(tiling, part_chunks=device.ungate_chunks)
        results["d_norm_weight"] = ((short.programs, tiling.values), jnp.float32)
        gradients = _launch(
            ungate_kernel, short, arrays | {"d_out": _flat(d_out)}, results, programs=3, size=2
        )
        d_weight = gradients["d_norm_weight"].reshape(tiling.batch, -1, tiling.values).sum(axis=1)
        gradients["d_norm_weight"] = d_weight.astype(operands.norm_weight.dtype)
        arrays["d_o"] = gradients.pop("d_o")
        del arrays["out_gate"], arrays["norm_weight"]
    arrays["d_final_state"] = _flat(d_final_state)
    with_state = operands.initial_state is not None
    pieces = [_scan_gradients(*piece, with_state) for piece in _by_values(tiling, arrays)]
    for name in pieces[0]:
        parts = [piece[name] for piece in pieces]
        of_values = name in ("d_v", "d_initial_state")
        gradients[name] = (
            jnp.concatenate(parts, axis=1) if of_values else functools.reduce(operator.add, parts)
        )
    gradients = {name.removeprefix("d_"): x for name, x in gradients.items()}
    return Operands(**{name: x.reshape(getattr(operands, name).shape) for name, x in gradients.items()})


def _by_values(
    tiling: TritonTiling, arrays: dict[str, Shaped[Array, "..."]]
) -> Iterator[tuple[TritonTiling, dict[str, Shaped[Array, "..."]]]]:
    """Yield the backward pass as scans of fewer values, if one launch would take too many registers.

    The output of a value depends on no other value. So the gradients of q, k and g are sums over the scans.
    """
    device = _tuning(tiling.scan)
    width = device.float32_values if tiling.dtype == jnp.float32 else tiling.values
    pieces = -(-tiling.values // width)
    width = -(-tiling.values // pieces)
    states = arrays["states"].reshape(-1, tiling.values, arrays["states"].shape[1])
    for start in range(0, tiling.values, width):
        here = slice(start, min(start + width, tiling.values))
        piece = {name: arrays[name][:, here] for name in ("v", "d_o", "d_final_state")}
        piece["states"] = _flat(states[:, here])
        yield dataclasses.replace(tiling, values=here.stop - start), arrays | piece


def _scan_gradients(
    tiling: TritonTiling, arrays: dict[str, Shaped[Array, "..."]], with_state: bool
) -> dict[str, Shaped[Array, "..."]]:
    """Return the gradients of q, k, v, g and, `with_state`, of the initial state."""
    if tiling.parts > 1:
        arrays = arrays | _launch(backward_parts_kernel, tiling, arrays, _part_results(tiling), programs=3)
    results = {f"d_{name}": _like(arrays[name]) for name in ("q", "k", "v", "g")}
    if with_state:
        results["d_initial_state"] = _end_state(tiling)
    return _launch(backward_kernel, tiling, arrays, results, programs=2)


def _prepare(operands: Operands, scan: Scan) -> tuple[TritonTiling, dict[str, Shaped[Array, "..."]]]:
    """Return the tiling of a scan over programs, and the arrays that they read, by name."""
    batch, tokens, heads, keys = operands.q.shape
    chunk = min(scan.chunk_size or STATE_INTERVAL, STATE_INTERVAL)
    chunk = min(chunk, max(SHORTEST_CHUNK, 1 << (tokens - 1).bit_length()))
    device = _tuning(scan)
    tiling = TritonTiling(
        scan=scan,
        batch=batch,
        tokens=tokens,
        heads=heads,
        keys=keys,
        values=operands.v.shape[3],
        chunk=chunk,
        part_chunks=device.part_chunks(batch * heads, -(-tokens // chunk)),
        dtype=operands.v.dtype,
        segmented=operands.segment_ids is not None,
        shared_operands=device.shared_operands,
    )
    special = ("norm_weight", "segment_ids")
    arrays = {
        name: _flat(x) for name, x in operands._asdict().items() if x is not None and name not in special
    }
    if operands.norm_weight is not None:
        arrays["norm_weight"] = operands.norm_weight
    if operands.segment_ids is not None:
        starts = segment_starts(to_scan_order(operands.segment_ids, scan.grid, scan.direction))
        arrays["segments"] = jnp.cumsum(starts, axis=1, dtype=jnp.int32).reshape(-1)
    return tiling, arrays


def _tuning(scan: Scan) -> tuning.GpuTuning:
    """Return the tuning parameters for the GPU that a scan is compiled for."""
    return tuning.gpu(None if scan.interpret else chip.current().kind)


def _flat(x: Float[Array, "... n"]) -> Float[Array, "m n"]:
    return x.reshape(-1, x.shape[-1])


def _like(x: Float[Array, "m n"]) -> Result:
    return x.shape, x.dtype


def _end_state(tiling: TritonTiling) -> Result:
    return (tiling.batch * tiling.heads * tiling.keys, tiling.values), jnp.float32


def _part_results(tiling: TritonTiling) -> dict[str, Result]:
    return {
        "local_state": ((tiling.programs * tiling.values, tiling.keys), jnp.float32),
        "local_decay": ((tiling.programs, tiling.keys), jnp.float32),
    }


def _launch(
    kernel: Callable[[TritonTiling, tuple[str, ...]], Callable[..., None]],
    tiling: TritonTiling,
    arrays: dict[str, Shaped[Array, "..."]],
    results: dict[str, Result],
    *,
    programs: int,
    size: int = 1,
) -> dict[str, Shaped[Array, "..."]]:
    """Launch a kernel and return its results by name.

    Args:
        programs: the programs that should share a core.
        size: the total size of its tiles, as a multiple of the forward kernel's.
    """
    device = _tuning(tiling.scan)
    # Per token: products with a state, and products with half the tokens of its chunk.
    states, pairs = (5, 6) if "states" in arrays else (2, 2)
    flops = (
        2 * states * tiling.keys * tiling.values + pairs * tiling.chunk * (tiling.keys + tiling.values) // 2
    )
    tokens = tiling.batch * tiling.tokens * tiling.heads
    sizes = [(x.shape, x.dtype) for x in arrays.values()] + list(results.values())
    state_size = size * tiling.key_width * tiling.value_width
    cost = pl.CostEstimate(
        flops=tokens * flops,
        transcendentals=2 * tokens * tiling.keys,
        bytes_accessed=sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in sizes),
    )
    registers = device.registers(programs, tiling.key_width * tiling.value_width, tiling.dtype.itemsize)
    outputs = call.call(
        kernel(dataclasses.replace(tiling, registers=registers), (*arrays, *results)),
        list(arrays.values()),
        list(results.values()),
        programs=tiling.programs,
        warps=device.num_warps(state_size),
        stages=device.num_stages(state_size, tiling.dtype.itemsize),
        cost=cost,
        interpret=tiling.scan.interpret,
    )
    return dict(zip(results, outputs, strict=True))


def tangent(
    operands: Operands, tangents: Operands, scan: Scan
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]] | None:
    """Return the tangents of a scan's results (see `pallas_gla.dispatch`)."""
    tiling, arrays = _prepare(operands, scan)
    if tiling.key_width * tiling.value_width > LARGEST_STATE:
        # Two such states and their chunks do not fit the shared memory of every GPU.
        return None
    dots = {f"{name}_dot": x for name, x in tangents._asdict().items() if x is not None}
    arrays |= {name: _flat(x) for name, x in dots.items()}
    if tiling.parts > 1:
        used = ("k", "v", "g", "segments", "k_dot", "v_dot", "g_dot")
        inputs = {name: arrays[name] for name in used if name in arrays}
        results = _part_results(tiling)
        results |= {"local_state_dot": results["local_state"], "local_moved": results["local_decay"]}
        arrays |= _launch(tangent_parts_kernel, tiling, inputs, results, programs=2, size=2)
    results = {"o_dot": _like(arrays["v"]), "final_state_dot": _end_state(tiling)}
    results = _launch(tangent_kernel, tiling, arrays, results, programs=2, size=2)
    return (
        results["o_dot"].reshape(operands.v.shape),
        results["final_state_dot"].reshape(tiling.batch, tiling.heads, tiling.keys, tiling.values),
    )
