"""The jobs of `gpu.py` that run this package's kernels: checks against the oracle, and device times.

A time is the time of one program that calls the function many times in a loop, divided by the number of
calls. A barrier makes the operands of the next call depend on the previous one. The row "loop" gives the cost
of the loop alone. Calls cycle through several sets of operands, together
larger than the L2 cache, and write all results to memory.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle  # noqa: E402
from pallas_gla import gated_gla_2d, gla_2d  # noqa: E402
from pallas_gla.triton import tuning  # noqa: E402

DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")
TOLERANCE = {"bfloat16": 5e-3, "float16": 5e-3, "float32": 1e-4}
NORMALIZER, EPS = 4.0, 1e-3
# (batch, tokens), the most important first. The first two are measured with every variant.
SHAPES = ((8, 4096), (32, 256), (8, 1024), (1, 16384))
L2_BYTES = 60e6
# Bytes per second of a copy, to choose how many calls to time.
BANDWIDTH = 4e12


@dataclasses.dataclass(frozen=True)
class Check:
    """A comparison of one call's results and gradients with a float64 recurrence on the CPU."""

    grid: tuple[int, int] = (1, 257)
    k: int = 32
    v: int = 64
    gate: str = "dig"
    dtype: str = "bfloat16"
    gate_dtype: str | None = None
    direction: str = "row"
    segments: bool = False
    gated: bool = False
    x64: bool = False
    chunk_size: int | None = None
    implementation: str | None = "triton"
    batch: int = 2
    heads: int = 2

    @property
    def name(self) -> str:
        """The fields that differ from the default, and the grid."""
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: x for name, x in changed.items() if x != getattr(Check, name) or name == "grid"}
        return " ".join(
            f"{name}={'x'.join(map(str, x)) if name == 'grid' else x}" for name, x in changed.items()
        )


def checks(quick: bool) -> list[Check]:
    """Return checks that cover the kernels' features."""
    cases = [
        Check(),
        Check((1, 2048), gate="strong"),
        Check((1, 257), gate="reset_1e4"),
        Check(dtype="float32"),
    ]
    cases += [Check((17, 9), direction=d, segments=True, gate="reset_60") for d in DIRECTIONS]
    cases += [Check((9, 17), direction=d, gated=True) for d in DIRECTIONS]
    if quick:
        return cases
    cases += [Check((1, t)) for t in (1, 15, 63, 64, 65, 200, 1000, 2048)]
    cases += [
        Check((1, 200), k, v, "strong") for k, v in ((16, 32), (64, 64), (64, 128), (60, 60), (128, 128))
    ]
    cases += [Check((1, 1000), gate=gate) for gate in ("strong", "reset_60", "reset_1e4", "none")]
    cases += [Check((1, 257), gate=gate, dtype="float32") for gate in ("strong", "reset_60", "reset_1e4")]
    cases += [
        Check(dtype="float16"),
        Check(dtype="float16", gate="reset_60", k=60),
        Check(gate_dtype="float32"),
    ]
    cases += [Check((13, 5), dtype="float32", gated=True, direction="column_reversed", gate_dtype="float32")]
    cases += [Check((1, 200), x64=True, segments=True), Check((1, 200), gate="strong", chunk_size=16)]
    # A long scan with few programs is split along T.
    cases += [Check((64, 64), batch=1, direction=d, gate="strong") for d in ("row", "column_reversed")]
    return [*cases, Check((64, 64), batch=1, gated=True, segments=True), Check(implementation=None)]


class CheckRun:
    """A lowered check."""

    def __init__(self, check: Check, *, interpret: bool, seed: int = 0):
        self.check = check
        tokens = math.prod(check.grid)
        seed += zlib.crc32(check.name.encode()) % 2**16
        shape = {"b": check.batch, "t": tokens, "h": check.heads, "k": check.k, "v": check.v}
        kind = {"dtype": check.dtype, "gate_dtype": check.gate_dtype or check.dtype}
        self.arrays, self.cotangents = oracle.inputs(seed, gate=check.gate, **shape, **kind)
        rng = np.random.default_rng(seed)
        if check.gated:
            q, k, v, g, state = self.arrays
            logits = jnp.asarray(4 * rng.standard_normal(g.shape), g.dtype)
            self.arrays = (q, k, v, logits, state)
        self.ids = np.cumsum(rng.random((check.batch, tokens)) < 0.05, axis=1, dtype=np.int32)
        self.gates = (
            jnp.asarray(rng.standard_normal(self.arrays[2].shape), check.dtype),
            jnp.asarray(rng.uniform(0.5, 2, check.v), jnp.float32),
        )
        options = {"grid": check.grid, "direction": check.direction, "chunk_size": check.chunk_size}
        options |= {"implementation": check.implementation, "return_final_state": True}
        if check.segments:
            options["segment_ids"] = jnp.asarray(self.ids)
        if interpret and check.implementation:
            options["interpret"] = True

        def scan(q, k, v, g, state, *gates):
            if check.gated:
                gating = {"gate_normalizer": NORMALIZER, "eps": EPS}
                return gated_gla_2d(q, k, v, g, *gates, initial_state=state, **gating, **options)
            return gla_2d(q, k, v, g, initial_state=state, **options)

        def results(arrays, cotangents):
            out, vjp = jax.vjp(scan, *arrays)
            return (*out, *vjp(cotangents))

        self.arguments = (self.arrays + (self.gates if check.gated else ()), self.cotangents)
        with jax.enable_x64(check.x64):
            self.lowered = jax.jit(results).lower(*self.arguments)

    def row(self, compiled: Any) -> dict[str, Any]:
        """Return relative RMS errors, and whether a second run gives identical bits."""
        with jax.enable_x64(self.check.x64):
            first, second = (jax.tree.map(np.asarray, compiled(*self.arguments)) for _ in range(2))
        errors = {}
        for name, actual, wanted in zip(oracle.GATED_NAMES, first, self.expected(), strict=False):
            actual = np.asarray(actual, np.float64)
            size = np.sqrt(np.mean(wanted**2)) or 1.0
            errors[name] = float(np.sqrt(np.mean((actual - wanted) ** 2)) / size)
        # The gradients of a gated scan of few tokens cancel (see the contract in kernels/README.md).
        tolerance = 8e-3 if self.check.gated else TOLERANCE[self.check.dtype]
        return {
            "errors": errors,
            "tolerance": tolerance,
            "ok": all(error <= tolerance for error in errors.values()),
            "repeatable": all(np.array_equal(x, y) for x, y in zip(first, second, strict=True)),
        }

    def expected(self) -> list[np.ndarray]:
        """Return the oracle's results, in the order of `oracle.GATED_NAMES`."""
        check = self.check
        ids = self.ids if check.segments else None
        options = {"grid": check.grid, "direction": check.direction, "segment_ids": ids}
        if not check.gated:
            return list(oracle.recurrence_2d(self.arrays, self.cotangents, **options).values())
        options |= {"normalizer": NORMALIZER, "eps": EPS}
        return list(oracle.gated_recurrence(self.arrays, self.gates, self.cotangents, **options).values())


@dataclasses.dataclass(frozen=True)
class Timing:
    """One function to time, in bfloat16 with K = 32 and V = 64; `backward` includes the forward pass."""

    op: str = "gla"
    batch: int = 8
    tokens: int = 4096
    heads: int = 18
    backward: bool = False
    direction: str = "row"
    implementation: str | None = "triton"
    chunk_size: int | None = None
    tuning: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The variant, without its shape and pass."""
        words = [self.op, *([self.implementation or "default"] if "gla" in self.op else [])]
        words += [self.direction] if self.direction != "row" else []
        words += [f"C={self.chunk_size}"] if self.chunk_size else []
        return " ".join([*words, *(f"{name}={x}" for name, x in self.tuning)])

    @property
    def token_heads(self) -> int:
        """Number of tokens times heads times batch elements."""
        return self.batch * self.tokens * self.heads

    @property
    def bytes(self) -> int:
        """Bytes that must cross HBM per token-head: 448 forward, 768 backward; 576 and 1024 with gates."""
        gated = self.op == "gated_gla_2d"
        if self.op == "copy" and self.backward:
            return 1280
        return (576 if gated else 448) + self.backward * (1024 if gated else 768)


def timings(quick: bool, tune: bool) -> list[Timing]:
    """Return the timings, the most important shapes first."""
    jobs = []
    shapes = SHAPES[: 4 if tune else 2 if quick else None]
    for heads in (18,) if quick or tune else (18, 6):
        for i, (batch, tokens) in enumerate(shapes):
            shape = {"batch": batch, "tokens": tokens, "heads": heads}
            for backward in (False, True):
                add = functools.partial(Timing, **shape, backward=backward)
                jobs += [add("copy")]
                if tune:
                    jobs += [add(tuning=candidate) for candidate in candidates(batch)]
                    jobs += [add(chunk_size=size) for size in (16, 32)]
                    continue
                jobs += [add("gla"), add("gla", implementation="xla")]
                jobs += [] if backward else [add("gla", implementation="mosaic")]
                directions = DIRECTIONS if i < 2 and heads == 18 else DIRECTIONS[:1]
                jobs += [add("gated_gla_2d", direction=direction) for direction in directions]
            jobs += [] if tune else [Timing("loop", **shape)]
    return jobs


def candidates(batch: int) -> list[tuple[tuple[str, int], ...]]:
    """Return alternative values for `tuning.GpuTuning`, as pairs of field and value."""
    blocks = [(("warps", warps), ("stages", stages)) for warps in (2, 4, 8) for stages in (1, 2, 3)]
    splits = [(("cores", n), ("least_chunks", chunks)) for n in (132, 264, 528, 1056) for chunks in (4, 8)]
    return (blocks if batch > 1 else []) + (splits if batch < 32 else [])


@contextlib.contextmanager
def tuned(changes: tuple[tuple[str, int], ...]) -> Iterator[None]:
    """Change fields of the device's `GpuTuning` while lowering."""
    own = tuning.gpu
    tuning.gpu = lambda kind: dataclasses.replace(own(kind), **dict(changes))
    try:
        yield
    finally:
        tuning.gpu = own


def operands(timing: Timing, seed: int) -> tuple[jax.Array, ...]:
    """Return q, k, v, g or logits, then out_gate and norm_weight if gated, then the cotangent if backward."""
    shape = (timing.batch, timing.tokens, timing.heads)
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    q, k, v, g, d_o, z = (
        jax.random.normal(next(keys), (*shape, n), jnp.bfloat16) for n in (32, 32, 64, 32, 64, 64)
    )
    gated = timing.op == "gated_gla_2d"
    arrays = (q, k, v, g if gated else (jax.nn.log_sigmoid(g.astype(jnp.float32)) / 16).astype(g.dtype))
    arrays += (z, jnp.ones(64, jnp.bfloat16)) if gated else ()
    return arrays + ((d_o,) if timing.backward else ())


def function(timing: Timing, *, interpret: bool = False) -> Callable[..., tuple[jax.Array, ...]]:
    """Return the function to time; it takes `operands`."""
    side = math.isqrt(timing.tokens)
    options = {"grid": (side, timing.tokens // side), "direction": timing.direction}
    options |= {"implementation": timing.implementation, "chunk_size": timing.chunk_size}
    if interpret and timing.implementation == "triton":
        options["interpret"] = True
    if timing.op == "loop":
        return lambda q, *rest: (q[:1, :1],)
    if timing.op == "copy":
        return _copy
    forward = functools.partial(gated_gla_2d if timing.op == "gated_gla_2d" else gla_2d, **options)
    return differentiated(forward) if timing.backward else lambda *arrays: (forward(*arrays),)


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
