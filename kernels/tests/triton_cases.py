"""Cases for the Triton kernels, checks against the oracle, and two ways to run the kernels without a GPU."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from unittest import mock

import gpu_compiler
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from pallas_gla.scan import Gating, Operands, Scan, saved_shape
from pallas_gla.triton import backend, call
from ptx_machine import Machine

DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
GATING = Gating(4.0, 1e-3)
# Grid, K, V, dtype, dtype of the decay, direction, segments. Every value occurs at least once.
COVERING = [
    ((1, 1), 32, 64, "float32", "float32", "row", False),
    ((3, 5), 16, 32, "bfloat16", "float32", "column", False),
    ((7, 9), 60, 60, "float32", "float32", "row_reversed", True),
    ((4, 16), 64, 64, "float16", "float16", "column_reversed", False),
    ((5, 13), 64, 128, "float32", "float32", "column", True),
    ((10, 20), 32, 64, "bfloat16", "bfloat16", "column_reversed", True),
    ((1, 257), 32, 64, "bfloat16", "float32", "row", False),
]
GATED_COVERING = [
    ((5, 13), 32, 64, "float32", "column_reversed", True),
    ((10, 13), 32, 64, "bfloat16", "row", False),
    ((3, 7), 16, 60, "float16", "column", False),
]
PRODUCT = list(
    itertools.product(
        [(1, 1), (3, 5), (7, 9), (4, 16), (5, 13), (10, 20), (1, 257), (20, 50)],
        [(32, 64), (16, 32), (64, 64), (64, 128), (60, 60), (128, 128)],
        TOLERANCE,
    )
)
GATED_PRODUCT = list(
    itertools.product(
        [(3, 5), (7, 9), (4, 16), (10, 20), (1, 257)], [(32, 64), (16, 32), (64, 64), (60, 60)], TOLERANCE
    )
)


def forward_and_backward(operands: Operands, cotangents: tuple, scan: Scan) -> tuple:
    """Return ((o, final_state), gradients)."""
    out, final_state, states = backend.forward(operands, scan, save=True)
    assert (states.shape, str(states.dtype)) == saved_shape(operands, scan)
    return (out, final_state), backend.backward(operands, states, *cotangents, scan)


@functools.partial(jax.jit, static_argnames="scan")
def interpreted(operands: Operands, cotangents: tuple, scan: Scan) -> tuple:
    """`forward_and_backward` in interpret mode, without Triton."""
    return forward_and_backward(operands, cotangents, dataclasses.replace(scan, interpret=True))


def tangents(operands: Operands, dots: Operands, scan: Scan) -> tuple:
    """Return the tangents of (o, final_state)."""
    results = backend.tangent(operands, dots, scan)
    assert results is not None
    return results


def compiled(
    gpu: str, machine: type[Machine] = Machine, function: Callable[..., tuple] = forward_and_backward
) -> Callable[..., tuple]:
    """Return a `function` that compiles with Triton for a GPU and runs the PTX in NumPy."""

    def run(operands: Operands, cotangents: tuple, scan: Scan) -> tuple:
        replacement = functools.partial(_call_compiled, gpu, machine, call.call)
        with mock.patch.object(call, "call", replacement):
            return function(operands, cotangents, scan)

    return run


def _call_compiled(gpu, machine, original, kernel, arrays, results, *, programs, **options):
    def launch(*arrays):
        return original(kernel, arrays, results, programs=programs, **options)

    [code] = gpu_compiler.compile_for(gpu, launch, *arrays).kernels.values()
    # NaN shows what a kernel does not write.
    outputs = [np.full(shape, np.nan, jnp.dtype(dtype)) for shape, dtype in results]
    machine(code.ptx, code.threads, code.shared).run([*map(np.array, arrays), *outputs], programs)
    return [jnp.asarray(x) for x in outputs]


def segments(batch, tokens):
    starts = np.random.default_rng(0).random((batch, tokens)) < 0.06
    return np.cumsum(starts, axis=1).astype(np.int32)


def assert_each_close(actual, expected, tolerance, names, kinds, batch):
    """Check the results for each kind of decay, which has `batch` elements of the batch."""
    for i, kind in enumerate(kinds):
        one = slice(i * batch, (i + 1) * batch)
        labels = [f"{name} with decays {kind}" for name in names]
        oracle.assert_close([x[one] for x in actual], [x[one] for x in expected], tolerance, labels)


def check(
    run, grid, k, v, dtype, gate_dtype, direction, segmented, gates=oracle.GATES, batch=2, tolerance=None
):
    """Compare the results and gradients of `gla_2d` with the oracle's."""
    tokens = grid[0] * grid[1]
    options = {"b": batch, "t": tokens, "h": 2, "k": k, "v": v, "dtype": dtype, "gate_dtype": gate_dtype}
    drawn = [oracle.inputs(0, gate=gate, **options) for gate in gates]
    arrays, cotangents = jax.tree.map(lambda *parts: np.concatenate(parts), *drawn)
    ids = segments(len(arrays[0]), tokens) if segmented else None
    expected = oracle.recurrence_2d(arrays, cotangents, grid=grid, direction=direction, segment_ids=ids)
    *qkvg, state = map(jnp.asarray, arrays)
    operands = Operands(*qkvg, initial_state=state, segment_ids=None if ids is None else jnp.asarray(ids))
    out, d = run(operands, jax.tree.map(jnp.asarray, cotangents), Scan(k**-0.5, grid, direction))
    actual = [*out, d.q, d.k, d.v, d.g, d.initial_state]
    assert [str(x.dtype) for x in actual] == [dtype, "float32", dtype, dtype, dtype, gate_dtype, "float32"]
    assert_each_close(actual, expected.values(), tolerance or TOLERANCE[dtype], oracle.NAMES, gates, batch)


def check_product(run, number, case):
    """Run `check` on a case of `PRODUCT`, in a direction and with a decay dtype that its number selects."""
    grid, widths, dtype = case
    gate_dtype = dtype if number % 7 < 4 else "float32"
    # Products round float16 to bfloat16, and a single token's error does not average out.
    tolerance = 1e-2 if dtype == "float16" and grid == (1, 1) else None
    options = {"batch": 1, "tolerance": tolerance}
    check(run, grid, *widths, dtype, gate_dtype, DIRECTIONS[number % 4], number % 5 < 2, **options)


def check_gated(
    run, grid, k, v, dtype, direction, segmented, strengths, batch=2, gating=GATING, tolerance=None
):
    """Compare the results and gradients of `gated_gla_2d` with the oracle's."""
    tokens = grid[0] * grid[1]
    options = {"b": batch, "t": tokens, "h": 2, "k": k, "v": v, "dtype": dtype, "gate_dtype": dtype}
    drawn = [oracle.inputs(3, gate="strong", **options) for _ in strengths]
    arrays, cotangents = jax.tree.map(lambda *x: np.concatenate(x), *drawn)
    strength = np.repeat(np.asarray(strengths, arrays[3].dtype), batch)
    q, keys, values, logits, state = arrays = (
        *arrays[:3],
        strength[:, None, None, None] * arrays[3],
        arrays[4],
    )
    weight = np.linspace(0.5, 2, v).astype(logits.dtype)
    gates = (np.roll(cotangents[0], 1, axis=1), np.broadcast_to(weight, (len(q), v)))
    ids = segments(len(q), tokens) if segmented else None
    expected = oracle.gated_recurrence(
        arrays,
        gates,
        cotangents,
        normalizer=gating.normalizer,
        eps=gating.eps,
        grid=grid,
        direction=direction,
        segment_ids=ids,
    )
    operands = Operands(q, keys, values, logits, *gates, state, ids)
    operands = Operands(*(None if x is None else jnp.asarray(x) for x in operands))
    scan = Scan(k**-0.5, grid, direction, gating=gating)
    out, d = run(operands, jax.tree.map(jnp.asarray, cotangents), scan)
    actual = [*out, d.q, d.k, d.v, d.g, d.initial_state, d.out_gate, d.norm_weight]
    tolerance = tolerance or TOLERANCE[dtype]
    assert_each_close(actual, expected.values(), tolerance, oracle.GATED_NAMES, strengths, batch)


def check_tangents(run, grid, dtype, direction, gated):
    """Compare the tangents of `gla_2d` or `gated_gla_2d` with the oracle's, by weak and by strong decays."""
    tokens, k, v = grid[0] * grid[1], 32, 64
    options = {"b": 1, "t": tokens, "h": 2, "k": k, "v": v, "dtype": dtype}
    ids = segments(1, tokens)
    for gate in ("dig", "reset_1e4") if tokens < 100 else ("dig",):
        (*arrays, state), (out_gate, _) = oracle.inputs(4, gate=gate, **options)
        (*dots, state_dot), (out_gate_dot, _) = oracle.inputs(5, **options)
        gates = (out_gate, jnp.linspace(0.5, 2, v)[None]) if gated else (None, None)
        gates_dot = (out_gate_dot, jnp.linspace(1, -1, v)[None]) if gated else (None, None)
        operands = Operands(*arrays, *gates, state, jnp.asarray(ids))
        moved = Operands(*dots, *gates_dot, state_dot)
        scan = Scan(k**-0.5, grid, direction, gating=GATING if gated else None)

        def expected(q, k, v, g, *rest, grid=grid):
            order = {"grid": grid, "direction": direction, "segment_ids": ids}
            if not gated:
                return oracle.recurrence_2d((q, k, v, g, rest[0]), **order)
            norm = {"normalizer": GATING.normalizer, "eps": GATING.eps}
            return oracle.gated_recurrence((q, k, v, g, rest[2]), rest[:2], **norm, **order)

        present = [(x, dot) for x, dot in zip(operands[:-1], moved[:-1], strict=True) if x is not None]
        wanted = oracle.tangents(expected, *zip(*present, strict=True)).values()
        tolerance = 1e-5 if dtype == "float32" else 8e-3
        oracle.assert_close(run(operands, moved, scan), wanted, tolerance, oracle.NAMES[:2])
