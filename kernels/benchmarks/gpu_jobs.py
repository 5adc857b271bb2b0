"""The jobs of `gpu.py` that time this package's kernels; `gpu_checks.py` checks their results.

A time is the time of one program that calls the function many times in a loop, divided by the number of
calls. A barrier makes the operands of the next call depend on the previous one. The row "loop" gives the cost
of the loop alone. Calls cycle through several sets of operands, together larger than the L2 cache, and write
all results to memory.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pallas_gla import gated_gla_2d, gla_2d  # noqa: E402
from pallas_gla.selective_scan import selective_scan  # noqa: E402
from pallas_gla.triton import tuning  # noqa: E402

DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")
TOLERANCE = {"bfloat16": 5e-3, "float16": 5e-3, "float32": 1e-4}
# (batch, tokens), the most important first. The first two are measured with every variant.
SHAPES = ((8, 4096), (32, 256), (8, 1024), (1, 16384))
# Heads of 64 channels of DiS-1152x64, whose scans have 2,304 channels.
DIS_HEADS = 36
# Bytes per token-head: forward, tangent, backward.
BYTES = {"gla": (448, 768, 768), "gated_gla_2d": (576, 1024, 1024), "selective_scan": (512, 0, 896)}
L2_BYTES = 60e6
# Bytes per second of a copy, to choose how many calls to time.
BANDWIDTH = 4e12


@dataclasses.dataclass(frozen=True)
class Timing:
    """One function to time, in bfloat16 with K = 32 and V = 64.

    backward: time the forward and the backward pass.
    tangent: time the tangent of the output, without the output.
    heads: `selective_scan` counts 64 channels as a head. It has 16 states per channel.
    """

    op: str = "gla"
    batch: int = 8
    tokens: int = 4096
    heads: int = 18
    backward: bool = False
    tangent: bool = False
    direction: str = "row"
    implementation: str | None = "triton"
    chunk_size: int | None = None
    tuning: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The variant, without its shape and pass."""
        has_kernel = self.op not in ("copy", "loop")
        words = [self.op, *([self.implementation or "default"] if has_kernel else [])]
        words += ["tangent"] if self.tangent else []
        words += [self.direction] if self.direction != "row" else []
        words += [f"C={self.chunk_size}"] if self.chunk_size else []
        return " ".join([*words, *(f"{name}={x}" for name, x in self.tuning)])

    @property
    def token_heads(self) -> int:
        """Number of tokens times heads times batch elements."""
        return self.batch * self.tokens * self.heads

    @property
    def bytes(self) -> int:
        """Bytes that must cross HBM per token-head (kernels/benchmarks/README.md)."""
        if self.op == "copy" and self.backward:
            return 1280
        forward, tangent, backward = BYTES.get(self.op, BYTES["gla"])
        return tangent if self.tangent else forward + self.backward * backward


def timings(quick: bool, tune: bool) -> list[Timing]:
    """Return the timings, the most important shapes first."""
    if tune:
        return tuning_timings()
    jobs = [job for batch, tokens in SHAPES[:2] for job in timings_of(batch, tokens, every=True)]
    jobs += [job for batch, tokens in SHAPES[:2] for job in selective_scan_timings(batch, tokens)]
    if quick:
        return jobs
    jobs += [job for batch, tokens in SHAPES[2:] for job in timings_of(batch, tokens)]
    return jobs + [job for batch, tokens in SHAPES for job in timings_of(batch, tokens, heads=6)]


def timings_of(batch: int, tokens: int, heads: int = 18, *, every: bool = False) -> list[Timing]:
    """Return the timings of GLA at one shape, or `every` variant of them."""
    shape = {"batch": batch, "tokens": tokens, "heads": heads}
    jobs = []
    for backward in (False, True):
        add = functools.partial(Timing, **shape, backward=backward)
        jobs += [add("copy"), add("gla")]
        jobs += [] if backward else [add("gla", implementation="mosaic")]
        directions = ("row", "column_reversed") if every else ("row",)
        jobs += [add("gated_gla_2d", direction=direction) for direction in directions]
        if not backward:
            ops = ("gla", "gated_gla_2d")
            jobs += [add(op, tangent=True, direction=direction) for op in ops for direction in directions]
    jobs += [Timing("loop", **shape)]
    return jobs + [Timing("gla", implementation="xla", **shape, backward=x) for x in (False, True)]


def selective_scan_timings(batch: int, tokens: int) -> list[Timing]:
    """Return the timings of the selective scan of DiS-1152x64."""
    shape = {"batch": batch, "tokens": tokens, "heads": DIS_HEADS}
    return [Timing(op, **shape, backward=x) for x in (False, True) for op in ("copy", "selective_scan")]


def tuning_timings() -> list[Timing]:
    """Return the timings of the candidates for `tuning.py`."""
    jobs = []
    for batch, tokens in SHAPES:
        for backward in (False, True):
            add = functools.partial(Timing, batch=batch, tokens=tokens, backward=backward)
            jobs += [add("copy"), *(add(tuning=candidate) for candidate in candidates(batch))]
            jobs += [add(chunk_size=size) for size in (16, 32)]
            if backward:
                few = [(("ungate_chunks", n),) for n in (1, 2, 4, 8)]
                jobs += [add("gated_gla_2d", tuning=candidate) for candidate in few]
        jobs += [Timing("loop", batch=batch, tokens=tokens)]
    return jobs


def candidates(batch: int) -> list[tuple[tuple[str, Any], ...]]:
    """Return alternative values for `tuning.GpuTuning`, as pairs of field and value."""
    blocks = [(("stages", ((n, tuning.GpuTuning.large_state),)),) for n in (1, 2, 3, 4)]
    blocks += [(("warps", warps),) for warps in (2, 8)]
    splits = [(("cores", n), ("least_chunks", chunks)) for n in (132, 264, 528, 1056) for chunks in (4, 8)]
    return (blocks if batch > 1 else []) + (splits if batch < 32 else [])


@contextlib.contextmanager
def tuned(changes: tuple[tuple[str, Any], ...]) -> Iterator[None]:
    """Change fields of the device's `GpuTuning` while lowering."""
    own = tuning.gpu
    tuning.gpu = lambda kind: dataclasses.replace(own(kind), **dict(changes))
    try:
        yield
    finally:
        tuning.gpu = own


def operands(timing: Timing, seed: int) -> tuple[jax.Array, ...]:
    """Return the arguments of `function`.

    They are q, k, v, g or logits, then out_gate and norm_weight if gated; x, dt, A, B, C, D and z for
    `selective_scan`. The cotangent follows if backward, or the tangents of all.
    """
    shape = (timing.batch, timing.tokens, timing.heads)
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    if timing.op == "selective_scan":
        wide, narrow = (*shape[:2], 64 * timing.heads), (*shape[:2], 16)
        rates = -jnp.broadcast_to(jnp.arange(1.0, 17), (wide[-1], 16))
        arrays = (normal(*wide), jax.nn.softplus(normal(*wide) - 4), rates, normal(*narrow), normal(*narrow))
        arrays += (jnp.ones(wide[-1]), normal(*wide))
        return arrays + ((normal(*wide),) if timing.backward else ())
    q, k, v, g, d_o, z = (normal(*shape, n) for n in (32, 32, 64, 32, 64, 64))
    gated = timing.op == "gated_gla_2d"
    arrays = (q, k, v, g if gated else (jax.nn.log_sigmoid(g.astype(jnp.float32)) / 16).astype(g.dtype))
    arrays += (z, jnp.ones(64, jnp.bfloat16)) if gated else ()
    if timing.tangent:
        return arrays + operands(dataclasses.replace(timing, tangent=False), seed + 1000)
    return arrays + ((d_o,) if timing.backward else ())


def function(timing: Timing, *, interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """Return the function to time; it takes `operands`."""
    if timing.op == "loop":
        return lambda q, *rest: (q[:1, :1],)
    if timing.op == "copy":
        return _copy
    options = {"implementation": timing.implementation}
    if interpret and timing.implementation == "triton":
        options["interpret"] = True
    if timing.op == "selective_scan":
        forward = functools.partial(selective_scan, **options)
    else:
        side = math.isqrt(timing.tokens)
        options |= {"grid": (side, timing.tokens // side), "direction": timing.direction}
        options |= {"chunk_size": timing.chunk_size}
        forward = functools.partial(gated_gla_2d if timing.op == "gated_gla_2d" else gla_2d, **options)
    if timing.tangent:
        return lambda *arrays: (jax.jvp(forward, *_halves(arrays))[1],)
    return differentiated(forward) if timing.backward else lambda *arrays: (forward(*arrays),)


def _halves(arrays: tuple) -> tuple[tuple, tuple]:
    return arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]


def differentiated(forward: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a function from operands and cotangent to output and gradients."""

    def run(*arrays):
        *arrays, d_out = arrays
        out, vjp = jax.vjp(forward, *arrays)
        return (out, *vjp(d_out))

    return run


def _copy(q, k, v, g, d_o=None):
    """Read and write the bytes of a scan, with almost no computation."""
    o = (v.reshape(*q.shape[:3], 2, -1) + (q + k + g)[:, :, :, None]).reshape(v.shape)
    return (o,) if d_o is None else (o, q + g, k - q, g - k, v + d_o)


def loop(function: Callable, sets: Sequence[tuple], calls: int) -> Callable:
    """Return a program that calls `function` `calls` times on every set (see the module docstring)."""

    def program(sets):
        firsts, rest = [first for first, *_ in sets], [rest for _, *rest in sets]
        results = [jax.tree.map(jnp.zeros_like, jax.eval_shape(function, *arrays)) for arrays in sets]

        def step(_, carry):
            firsts, results = carry
            results = [function(first, *arrays) for first, arrays in zip(firsts, rest, strict=True)]
            return [_after(first, result) for first, result in zip(firsts, results, strict=True)], results

        return jax.lax.fori_loop(0, calls, step, (firsts, results))[1]

    return jax.jit(program)


def _after(first: jax.Array, results: tuple[jax.Array, ...]) -> jax.Array:
    """Return `first`, made to depend on the results.

    The barrier keeps the compiler from moving calls out of the loop, and adds no copy of `first`.
    """
    return jax.lax.optimization_barrier((first, results))[0]


class TimingRun:
    """A lowered timing. `build` and `make` create the function and its operands."""

    def __init__(
        self,
        timing: Timing,
        *,
        interpret: bool = False,
        build: Callable | None = None,
        make: Callable = operands,
        seconds: float = 0.015,
    ):
        self.timing, self.make = timing, make
        least = timing.token_heads * timing.bytes / BANDWIDTH
        # More sets than the cache can hold, and enough calls to hide the dispatch.
        self.sets = min(8, math.ceil(3 * L2_BYTES / (timing.token_heads * timing.bytes)))
        self.calls = max(2, min(1000, round(seconds / (2.5 * least * self.sets))))
        shapes = [jax.eval_shape(functools.partial(make, timing, 0))] * self.sets
        with tuned(timing.tuning):
            run = build(timing) if build else function(timing, interpret=interpret)
            self.lowered = loop(run, shapes, self.calls).lower(shapes)

    def row(self, compiled: Any, repeats: int = 7) -> dict[str, Any]:
        """Return microseconds per call: minimum and median over the repeats."""
        sets = [self.make(self.timing, seed) for seed in range(self.sets)]
        jax.block_until_ready(compiled(sets))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(sets))
            times.append((time.perf_counter() - start) / (self.calls * self.sets) * 1e6)
        return time_row(self.timing, times) | {"sets": self.sets, "calls": self.calls}


def time_row(timing: Timing, microseconds: Sequence[float]) -> dict[str, Any]:
    """Return the row of a timing."""
    least = min(microseconds)
    return {
        **{name: getattr(timing, name) for name in ("batch", "tokens", "heads", "backward", "bytes")},
        "us": least,
        "us_median": float(np.median(microseconds)),
        "ps": least * 1e6 / timing.token_heads,
    }


def compiled_in_groups(
    jobs: Sequence[Any], size: int, lower: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (job, run, compiled program or error); compile `size` jobs in parallel before running any."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(jobs), size):
            pending = []
            for job in jobs[start : start + size]:
                try:
                    run = lower(job)
                    pending.append((job, run, pool.submit(run.lowered.compile)))
                except Exception as error:
                    pending.append((job, None, error))
            futures = [x for _, _, x in pending if isinstance(x, concurrent.futures.Future)]
            concurrent.futures.wait(futures)
            for job, run, future in pending:
                if future in futures:
                    future = future.exception() or future.result()
                yield job, run, future
