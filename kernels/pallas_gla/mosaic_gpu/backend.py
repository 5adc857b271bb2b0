"""An experimental GLA forward pass for Hopper (sm_90a), as a Pallas (Mosaic GPU) kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Float

from pallas_gla import chip
from pallas_gla.mosaic_gpu.kernel import CHUNK, VALUES, HopperKernel, HopperProgram
from pallas_gla.scan import Operands, Scan, saved_shape
from pallas_gla.triton import backend as triton_backend
from pallas_gla.validation import one_of

if hasattr(gpu, "InterpretGPUParams"):
    InterpretParams: Any = getattr(gpu, "InterpretGPUParams")  # noqa: B009
else:  # JAX 0.10
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as InterpretParams

KEYS = (32, 64)

# `forward` saves the states that Triton's backward pass reads.
backward = triton_backend.backward
# This kernel has no tangent of its own.
tangent = triton_backend.tangent


def unsupported(operands: Operands, scan: Scan) -> str | None:
    """Return why this kernel does not support a scan, or None if it does."""
    tokens, keys, values = operands.q.shape[1], operands.q.shape[3], operands.v.shape[3]
    v, g, lines = operands.v.dtype, operands.g.dtype, _lines(scan, tokens)
    aligned = not scan.by_columns or lines in (8, 16, 32) or lines % CHUNK == 0
    gpu = chip.current()
    old_or_new = not scan.interpret and gpu.compute_capability not in (None, (9, 0))
    checks = (
        (not old_or_new, f"unsupported GPU: got {gpu}; expected sm_90a (Hopper)"),
        (keys in KEYS, f"unsupported K: got {keys}; expected {one_of(KEYS)}"),
        (values == VALUES, f"unsupported V: got {values}; expected {VALUES}"),
        (v == jnp.bfloat16, f"unsupported dtype of v: got {v}; expected bfloat16"),
        (g in (jnp.bfloat16, jnp.float32), f"unsupported dtype of g: got {g}; expected bfloat16 or float32"),
        (tokens % CHUNK == 0, f"unsupported T: got {tokens}; expected a multiple of {CHUNK}"),
        (
            aligned,
            f"unsupported rows in a column scan: got grid {scan.grid}; expected 8, 16, 32 or {CHUNK} * n",
        ),
        (
            scan.chunk_size in (None, CHUNK),
            f"unsupported chunk_size: got {scan.chunk_size}; expected None or {CHUNK}",
        ),
        (scan.gating is None, "unsupported function: got gated_gla_2d; expected gla or gla_2d"),
        (operands.segment_ids is None, "unsupported segment_ids: got an array; expected None"),
        (True, triton_backend.unsupported(operands, scan)),
    )
    return next((reason for supported, reason in checks if not supported), checks[-1][1])


def forward(
    operands: Operands, scan: Scan, *, save: bool
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """Run a scan (see `pallas_gla.dispatch`)."""
    batch, tokens, heads, keys = operands.q.shape
    kernel = HopperKernel(
        scan, heads, keys, tokens // CHUNK, _lines(scan, tokens), operands.g.dtype == jnp.float32
    )
    inputs = {name: getattr(operands, name).reshape(batch * kernel.lines, -1) for name in "qkvg"}
    state_shape = (batch * heads, keys, VALUES)
    if operands.initial_state is not None:
        inputs["initial_state"] = operands.initial_state.astype(jnp.float32).reshape(state_shape)
    results = {"o": (inputs["v"].shape, jnp.bfloat16), "final_state": (state_shape, jnp.float32)}
    states, dtype = saved_shape(operands, scan)
    if save:
        results["states"] = (batch * kernel.chunks * VALUES, heads * keys), dtype
    names, tiles = (*inputs, *results), kernel.tiles()

    def gla_forward(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        pl.run_scoped(lambda **tiles: HopperProgram.current(kernel, named | tiles).run(), **tiles)

    launch = gpu.kernel(
        gla_forward,
        out_type=[jax.ShapeDtypeStruct(*result) for result in results.values()],
        grid=(batch * heads,),
        grid_names=("program",),
        # Instead of automatic barriers, `commit_smem` precedes every read of another warp's writes.
        compiler_params=gpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=gpu.LoweringSemantics.Lane,
        ),
        interpret=InterpretParams() if scan.interpret else None,
    )
    results = dict(zip(results, launch(*inputs.values()), strict=True))
    return (
        results["o"].reshape(operands.v.shape),
        results["final_state"].reshape(batch, heads, keys, VALUES),
        results["states"].reshape(states) if save else None,
    )


def _lines(scan: Scan, tokens: int) -> int:
    """Return the tokens of a run with constant stride in memory: one column's, or all."""
    return scan.grid[0] if scan.by_columns and min(scan.grid) > 1 else tokens
