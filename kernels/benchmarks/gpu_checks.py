"""The checks of `gpu.py`: this package's kernels against float64 recurrences on the CPU."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import gpu_jobs
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import scan_oracle
from pallas_gla import gated_gla_2d, gla_2d
from pallas_gla.selective_scan import selective_scan

# The gradients of a gated scan of few tokens cancel (see the contract in kernels/README.md). The terms of
# tangents cancel too.
CANCELING = 8e-3
# float32 arrays whose errors may not hide behind larger numbers: tangents, and the channels of dg.
EXACT = 1e-5
NORMALIZER, EPS = 4.0, 1e-3


@dataclasses.dataclass(frozen=True)
class Check:
    """A comparison of one call's results and gradients, or their tangents, with a float64 recurrence.

    gate: kind of decays of `oracle.gates`, or the decay of all tokens. Gated scans: "strong" or weak.
    tangents: compare the tangents of the results, in forward mode.
    nan: set a segment's tokens to NaN in all arrays, and compare the others. Needs `segments`.
    """

    grid: tuple[int, int] = (1, 257)
    k: int = 32
    v: int = 64
    gate: str | float = "dig"
    dtype: str = "bfloat16"
    gate_dtype: str | None = None
    direction: str = "row"
    segments: bool = False
    gated: bool = False
    tangents: bool = False
    nan: bool = False
    x64: bool = False
    chunk_size: int | None = None
    implementation: str | None = "triton"
    batch: int = 2
    heads: int = 2

    @property
    def name(self) -> str:
        """The fields that differ from the default, and the grid."""
        return changes(self, {"grid": "x".join(map(str, self.grid))})

    @property
    def tolerance(self) -> float:
        """Largest relative error."""
        if self.dtype == "float32" and (self.tangents or not isinstance(self.gate, str)):
            return EXACT
        return CANCELING if self.gated or self.tangents else gpu_jobs.TOLERANCE[self.dtype]


def changes(check: Any, words: dict[str, Any]) -> str:
    """Return fields of a check that differ from their defaults as text, after `words`."""
    fields = {f.name: getattr(check, f.name) for f in dataclasses.fields(check) if f.name not in words}
    words |= {name: x for name, x in fields.items() if x != getattr(type(check), name)}
    return " ".join(f"{name}={x}" for name, x in words.items())


def checks(quick: bool) -> list[Any]:
    """Return checks that cover the kernels' features, those of most features first."""
    both = ("row", "column_reversed")
    cases = [Check(), Check((1, 2048), gate="strong"), Check(gate="reset_1e4"), Check(dtype="float32")]
    cases += [Check(gate=decay, dtype=dtype) for decay in (-5.0, -20.0) for dtype in ("bfloat16", "float32")]
    for gate in ("dig", "strong"):
        tangents = {"gate": gate, "tangents": True}
        cases += [Check((9, 17), direction=d, gated=x, **tangents) for d in both for x in (False, True)]
        cases += [Check(dtype="float32", **tangents)]
    nan = {"segments": True, "nan": True}
    cases += [Check((17, 9), direction=d, **nan) for d in both]
    cases += [Check((17, 9), tangents=True, gated=gated, **nan) for gated in (False, True)]
    cases += [ScanCheck(), ScanCheck(reverse=True, step=30.0), ScanCheck(dtype="bfloat16")]
    cases += [Check((17, 9), direction=d, segments=True, gate="reset_60") for d in gpu_jobs.DIRECTIONS]
    cases += [Check((9, 17), direction=d, gated=True) for d in gpu_jobs.DIRECTIONS]
    if quick:
        return cases
    cases += [Check((1, t)) for t in (1, 15, 63, 64, 65, 200, 1000, 2048)]
    cases += [
        Check((1, 200), k, v, "strong") for k, v in ((16, 32), (64, 64), (64, 128), (60, 60), (128, 128))
    ]
    # A long scan with few programs is split along T.
    cases += [Check((64, 64), batch=1, direction=d, gate="strong") for d in both]
    cases += [Check((64, 64), batch=1, gated=True, segments=True), Check((64, 64), batch=1, tangents=True)]
    cases += [Check((1, 1000), gate=gate) for gate in ("strong", "reset_60", "reset_1e4", "none")]
    cases += [Check((1, 257), gate=gate, dtype="float32") for gate in ("strong", "reset_60", "reset_1e4")]
    cases += [Check(dtype="float16"), Check(dtype="float16", gate="reset_60", k=60)]
    cases += [Check(gate_dtype="float32")]
    cases += [Check((13, 5), dtype="float32", gated=True, direction="column_reversed", gate_dtype="float32")]
    cases += [Check((1, 200), x64=True, segments=True), Check((1, 200), gate="strong", chunk_size=16)]
    return [*cases, Check(implementation=None)]


def small_checks() -> list[Any]:
    """Return a check of each kind that is small enough for interpret mode."""
    small = {"k": 16, "v": 16, "batch": 1, "heads": 1}
    return [
        Check((2, 9), gate=-20.0, dtype="float32", **small),
        Check((3, 7), gated=True, heads=1),
        Check((4, 20), tangents=True, nan=True, segments=True, direction="column", **small),
        ScanCheck(tokens=9, channels=8),
    ]


def lower(check: Any, *, interpret: bool) -> Any:
    """Lower a check."""
    return (ScanCheckRun if isinstance(check, ScanCheck) else CheckRun)(check, interpret=interpret)


class CheckRun:
    """A lowered check."""

    def __init__(self, check: Check, *, interpret: bool):
        self.check = check
        seed = zlib.crc32(check.name.encode()) % 2**16
        self.primals, self.cotangents = drawn(check, seed)
        dots = drawn(check, seed + 1)[0]
        rng = np.random.default_rng(seed)
        self.ids = np.cumsum(rng.random((check.batch, math.prod(check.grid))) < 0.05, axis=1, dtype=np.int32)
        self.clean = (self.primals, dots if check.tangents else self.cotangents)
        self.arguments = self.clean
        if check.nan:
            middle = self.ids[:, self.ids.shape[1] // 2]
            self.spoiled = (self.ids == middle[:, None])[:, :, None, None]
            self.arguments = jax.tree.map(lambda x: self.without_spoiled(x, np.nan), self.clean)
        with jax.enable_x64(check.x64):
            self.lowered = jax.jit(results(check, self.ids, interpret)).lower(*self.arguments)

    def without_spoiled(self, x: Any, value: float) -> Any:
        """Return an array whose spoiled tokens, if it has tokens, have another value."""
        has_tokens = self.check.nan and x.ndim == 4 and x.shape[1] == self.ids.shape[1]
        return jnp.where(self.spoiled, value, x) if has_tokens else x

    def row(self, compiled: Any) -> dict[str, Any]:
        """Return relative RMS errors, and whether a second run gives identical bits."""
        with jax.enable_x64(self.check.x64):
            runs = [jax.tree.map(np.asarray, compiled(*self.arguments)) for _ in range(2)]
        runs = [[np.asarray(self.without_spoiled(x, 0)) for x in run] for run in runs]
        expected = {name: np.asarray(self.without_spoiled(x, 0)) for name, x in self.expected().items()}
        channels = not isinstance(self.check.gate, str)
        return compared(runs, expected, self.check.tolerance, ("dg",) if channels else ())

    def expected(self) -> dict[str, np.ndarray]:
        """Return the oracle's results, by the names of `oracle.GATED_NAMES`."""
        check = self.check
        options = {"grid": check.grid, "direction": check.direction}
        options |= {"segment_ids": self.ids} if check.segments else {}

        def run(*arrays, cotangents=None):
            if not check.gated:
                return oracle.recurrence_2d(arrays, cotangents, **options)
            gating = {"normalizer": NORMALIZER, "eps": EPS}
            return oracle.gated_recurrence(arrays[:5], arrays[5:], cotangents, **gating, **options)

        if check.tangents:
            return oracle.tangents(run, *self.clean)
        return run(*self.primals, cotangents=self.cotangents)


def drawn(check: Check, seed: int) -> tuple[tuple, tuple]:
    """Return random operands and the cotangents of the results."""
    shape = {"b": check.batch, "t": math.prod(check.grid), "h": check.heads, "k": check.k, "v": check.v}
    kind = {"dtype": check.dtype, "gate_dtype": check.gate_dtype or check.dtype}
    gate = check.gate if isinstance(check.gate, str) else "none"
    (q, k, v, g, state), cotangents = oracle.inputs(seed, gate=gate, **shape, **kind)
    if not check.gated:
        g = g if isinstance(check.gate, str) else jnp.full_like(g, check.gate)
        return (q, k, v, g, state), cotangents
    rng = np.random.default_rng(seed)
    strength = 40 if check.gate == "strong" else 4
    logits = jnp.asarray(strength * rng.standard_normal(g.shape), g.dtype)
    out_gate = jnp.asarray(rng.standard_normal(v.shape), check.dtype)
    weight = jnp.asarray(rng.uniform(0.5, 2, check.v), jnp.float32)
    return (q, k, v, logits, state, out_gate, weight), cotangents


def results(check: Check, ids: np.ndarray, interpret: bool) -> Callable:
    """Return a function from (operands, cotangents or tangents) to the arrays to compare."""
    options = {"grid": check.grid, "direction": check.direction, "chunk_size": check.chunk_size}
    options |= {"implementation": check.implementation, "return_final_state": True}
    if check.segments:
        options["segment_ids"] = jnp.asarray(ids)
    if interpret and check.implementation:
        options["interpret"] = True

    def scan(q, k, v, g, state, *gates):
        if check.gated:
            gating = {"gate_normalizer": NORMALIZER, "eps": EPS}
            return gated_gla_2d(q, k, v, g, *gates, initial_state=state, **gating, **options)
        return gla_2d(q, k, v, g, initial_state=state, **options)

    def run(primals, others):
        if check.tangents:
            return jax.jvp(scan, primals, others)[1]
        out, vjp = jax.vjp(scan, *primals)
        return (*out, *vjp(others))

    return run


@dataclasses.dataclass(frozen=True)
class ScanCheck:
    """A comparison of `selective_scan`'s results and gradients with `scan_oracle`."""

    batch: int = 2
    tokens: int = 257
    channels: int = 96
    step: float = 0.05
    dtype: str = "float32"
    reverse: bool = False

    @property
    def name(self) -> str:
        """The number of tokens and the fields that differ from the default."""
        return f"selective_scan {changes(self, {'tokens': self.tokens})}"


class ScanCheckRun:
    """A lowered check of `selective_scan`."""

    def __init__(self, check: ScanCheck, *, interpret: bool):
        self.check = check
        arrays = scan_oracle.inputs(check.batch, check.tokens, check.channels, step=check.step)
        tokens = ("x", "dt", "B", "C", "z")
        arrays = {name: jnp.asarray(x, check.dtype if name in tokens else None) for name, x in arrays.items()}
        other = scan_oracle.inputs(check.batch, check.tokens, check.channels, seed=1)
        self.arguments = arrays, (jnp.asarray(other["x"], check.dtype), jnp.asarray(other["initial_state"]))

        def run(arrays, cotangents):
            options = {"reverse": check.reverse, "implementation": "triton", "interpret": interpret}
            out, vjp = jax.vjp(lambda x: selective_scan(**x, **options, return_final_state=True), arrays)
            gradients = vjp(cotangents)[0]
            return (*out, *(gradients[name] for name in scan_oracle.NAMES))

        self.lowered = jax.jit(run).lower(*self.arguments)

    def row(self, compiled: Any) -> dict[str, Any]:
        """Return relative RMS errors, and whether a second run gives identical bits."""
        runs = [jax.tree.map(np.asarray, compiled(*self.arguments)) for _ in range(2)]
        arrays, (d_y, d_state) = self.arguments
        options = {"reverse": self.check.reverse}
        y, state = scan_oracle.run(**arrays, **options)
        gradients = scan_oracle.gradients(**arrays, d_y=d_y, d_final_state=d_state, **options)
        expected = {"y": y, "final_state": state} | {f"d{name}": x for name, x in gradients.items()}
        return compared(
            runs, expected, EXACT if self.check.dtype == "float32" else gpu_jobs.TOLERANCE["bfloat16"]
        )


def compared(
    runs: Sequence[Sequence[np.ndarray]],
    expected: dict[str, np.ndarray],
    tolerance: float,
    by_channel: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a check's row: relative RMS errors of the first of two runs, and whether both are identical.

    The error of an array in `by_channel` is the largest of a channel over all tokens.
    """
    first, second = runs
    errors = {}
    for actual, (name, wanted) in zip(first, expected.items(), strict=True):
        axis = 1 if name in by_channel else None
        error, size = (
            np.sqrt(np.mean(np.square(x), axis=axis)) for x in (np.float64(actual) - wanted, wanted)
        )
        errors[name] = float(np.max(error / np.where(size > 0, size, 1.0)))
    return {
        "errors": errors,
        "tolerance": tolerance,
        "ok": all(error <= tolerance for error in errors.values()),
        "repeatable": all(np.array_equal(x, y) for x, y in zip(first, second, strict=True)),
    }
