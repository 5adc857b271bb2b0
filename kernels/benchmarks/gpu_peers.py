"""The jobs of `gpu.py` that run other GLA kernels with the same GPU, shapes and bytes.

These are flash-linear-attention (PyTorch and Triton), jax-linear-attention (Mosaic GPU), and one of fla's
Triton kernels called from JAX through jax-triton. Each job imports the packages that it needs.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import gpu_jobs
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from gpu_jobs import Timing, TimingRun

# The same number of heads as in the timings, because fla tunes its kernels per number.
VALUES = {"b": 1, "t": 257, "h": 18, "k": 32, "v": 64, "gate": "strong", "dtype": "bfloat16"}


def peer_timings(quick: bool) -> list[Timing]:
    """Return the timings of our own ungated `gla`."""
    own = gpu_jobs.timings(quick, tune=False)
    return [timing for timing in own if timing.op == "gla" and timing.implementation == "triton"]


def error_row(results: Sequence[Any], cotangents: tuple) -> dict[str, Any]:
    """Return a check's row for (o, final_state, dq, dk, dv, dg): relative errors against the oracle."""
    (*tokens, state), _ = oracle.inputs(0, **VALUES, gate_dtype="bfloat16")
    expected = oracle.recurrence((*tokens, jnp.zeros_like(state)), cotangents)
    errors = {}
    for actual, (name, wanted) in zip(results, expected.items(), strict=False):
        difference = np.asarray(actual, np.float64) - wanted
        errors[name] = float(np.sqrt(np.mean(difference**2) / np.mean(wanted**2)))
    tolerance = gpu_jobs.TOLERANCE["bfloat16"]
    return {"errors": errors, "tolerance": tolerance, "ok": all(x <= tolerance for x in errors.values())}


# flash-linear-attention.


def fla_values() -> dict[str, Any]:
    """Check fla's `chunk_gla`, because Triton 3.4 to 3.7.0 miscompile some of its kernels on Hopper."""
    import torch
    from fla.ops.gla import chunk_gla

    (*tokens, _), cotangents = oracle.inputs(0, **VALUES, gate_dtype="bfloat16")
    tokens = [_to_torch(x).requires_grad_() for x in tokens]
    out = chunk_gla(*tokens, output_final_state=True)
    gradients = torch.autograd.grad(out, tokens, [_to_torch(x) for x in cotangents])
    return error_row([x.detach().float().cpu().numpy() for x in (*out, *gradients)], cotangents)


def _to_torch(x: jax.Array) -> Any:
    import torch

    return torch.tensor(np.asarray(x, np.float32), dtype=getattr(torch, str(x.dtype)), device="cuda")


def fla_time(timing: Timing, repeats: int = 7, calls: int = 8) -> dict[str, Any]:
    """Time with CUDA events: eagerly, and as a CUDA graph without launch costs."""
    import torch
    from fla.ops.gla import chunk_gla

    shape = (timing.batch, timing.tokens, timing.heads)
    needed = -(-3 * gpu_jobs.L2_BYTES // (timing.token_heads * timing.bytes))
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(n):
        return torch.randn(*shape, n, generator=generator, device="cuda").bfloat16()

    sets = []
    for _ in range(int(min(8, needed))):
        q, k, v, d_o = normal(32), normal(32), normal(64), normal(64)
        g = (torch.nn.functional.logsigmoid(normal(32).float()) / 16).bfloat16()
        sets.append(([x.requires_grad_(timing.backward) for x in (q, k, v, g)], d_o))

    def run():
        for arrays, d_o in sets:
            o, _ = chunk_gla(*arrays)
            if timing.backward:
                torch.autograd.grad(o, arrays, d_o)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    eager = cuda_times(lambda: [run() for _ in range(calls)], repeats, calls * len(sets))
    method, times = "eager", eager
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = cuda_times(lambda: [graph.replay() for _ in range(calls)], repeats, calls * len(sets))
        method = "cuda graph"
    except RuntimeError as error:
        method = f"eager (no graph: {str(error).splitlines()[0]})"
    row = gpu_jobs.time_row(timing, times)
    return row | {"sets": len(sets), "calls": calls, "method": method, "us_eager": min(eager)}


def cuda_times(run: Callable[[], Any], repeats: int, calls: int) -> list[float]:
    """Return microseconds per call by CUDA events, one number per repeat."""
    import torch

    times = []
    run()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return times


# jax-linear-attention.


def jla_forward(q, k, v, g, **options):
    """Run the Mosaic GPU kernel. It supports only K = 64 and 128, so q, k and g are padded with zeros."""
    from jla.ops import linear_attention

    options = {"scale": 32**-0.5, "impl": "mosaic_gpu"} | options
    return linear_attention("gla", q, k, v, g=g, **options)


def jla_run(timing: Timing) -> TimingRun:
    """Lower a timing. It excludes the padding but includes the bytes of the padded arrays."""

    def build(timing):
        def forward(*arrays):
            return jla_forward(*arrays)[0]

        return gpu_jobs.differentiated(forward) if timing.backward else lambda *arrays: (forward(*arrays),)

    def make(timing, seed):
        q, k, v, g, *rest = gpu_jobs.operands(timing, seed)
        return (_pad(q), _pad(k), v, _pad(g), *rest)

    return TimingRun(timing, build=build, make=make)


def _pad(x):
    return jnp.pad(x, [(0, 0)] * 3 + [(0, 64 - x.shape[-1])])


def jla_values() -> dict[str, Any]:
    """Check values and gradients."""
    (*tokens, _), cotangents = oracle.inputs(0, **VALUES, gate_dtype="bfloat16")

    def forward(q, k, v, g):
        o, state = jla_forward(_pad(q), _pad(k), v, _pad(g), output_final_state=True)
        return o, state[:, :, : VALUES["k"]]

    @jax.jit
    def results(tokens, cotangents):
        out, vjp = jax.vjp(forward, *tokens)
        return (*out, *vjp(cotangents))

    return error_row([x.astype(jnp.float32) for x in results(tokens, cotangents)], cotangents)


# One of fla's Triton kernels through jax-triton, in the same process as fla.


def jax_triton_output_kernel(timing: Timing) -> dict[str, Any]:
    """Check and time the kernel launched by JAX, next to fla's launch of the same configuration."""
    import jax_triton
    import torch
    from fla.ops.gla import chunk
    from fla.ops.utils import chunk_local_cumsum
    from fla_output_kernel import kernel, output_last

    # jax-triton 0.3 sets this to the empty string, which disables Triton's own cache.
    os.environ.pop("TRITON_CACHE_DIR", None)
    q, k, v, g = (torch.from_dlpack(x) for x in gpu_jobs.operands(timing, 0))
    batch, tokens, heads, width = q.shape
    scale = width**-0.5
    log_decay = chunk_local_cumsum(g, 64, scale=1 / np.log(2))
    h, _ = chunk.chunk_fwd_h(k=k, v=v, gk=log_decay)
    scores = chunk.chunk_gla_fwd_intra_gk(q=q, k=k, g=log_decay, scale=scale)
    grid, warps = (-(-tokens // 64), batch * heads), {"num_warps": 4, "num_stages": 2}
    expected = torch.empty_like(v)

    def launch():
        arrays = (q, v, log_decay, h, expected, scores, None, None, scale)
        kernel[grid](*arrays, tokens, heads, heads, width, 64, 64, 32, 64, False, False, **warps)

    times = cuda_times(lambda: [launch() for _ in range(20)], 7, 20)

    def call(q, v, g, h, scores):
        static = {"scale": scale, "H": heads, "K": width, "V": 64, "kernel": output_last, "grid": grid}
        out = jax.ShapeDtypeStruct(v.shape, v.dtype)
        return (jax_triton.triton_call(q, v, g, h, scores, tokens, out_shape=out, **static, **warps),)

    inputs = tuple(jnp.from_dlpack(x.contiguous()) for x in (q, v, log_decay, h, scores))
    actual = torch.from_dlpack(jax.block_until_ready(jax.jit(call)(*inputs)[0]))
    run = TimingRun(timing, build=lambda _: call, make=lambda *_: inputs)
    row = run.row(run.lowered.compile())
    difference = (actual.float() - expected.float()).abs().max().item()
    # Bytes per token-head of q, v, float32 g and scores, states and o.
    row |= {"bytes": 64 + 128 + 128 + 256 + 64 + 128, "us_fla_launch": min(times)}
    return row | {"largest_difference_from_fla": difference} | _refusals(call, inputs)


def _refusals(call: Callable, inputs: Sequence[jax.Array]) -> dict[str, str]:
    """Return how jax-triton responds to transformations and platforms that our backends must support."""
    few = [x[:1] for x in inputs]

    def says(attempt):
        try:
            attempt()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return "works"

    return {
        "vmap": says(lambda: jax.vmap(call)(*(x[None] for x in few))),
        "jvp": says(lambda: jax.jvp(lambda q: call(q, *few[1:])[0], (few[0],), (few[0],))),
        "lower for tpu": says(lambda: jax.jit(call).trace(*few).lower(lowering_platforms=("tpu",))),
        "lower for cpu": says(lambda: jax.jit(call).trace(*few).lower(lowering_platforms=("cpu",))),
    }
