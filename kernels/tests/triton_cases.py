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


# Log decays per token, and sizes of the first 20 tokens and the rest with a decay of -38 between them.
UNEVEN = [0.0, -0.05, -0.2, -1.0, -1.3, -2.0, -5.0, -10.0, -20.0, -30.0, (10, 1), (1, 10), (100, 1), (1, 100)]


def uneven(decays, dtype):
    """Return (arrays, cotangents) for an element of `UNEVEN`."""
    (q, k, v, g, state), (d_o, d_state) = oracle.inputs(5, b=1, t=64, h=1, k=32, v=64)
    size = np.ones(64)
    if isinstance(decays, tuple):
        size = np.where(np.arange(64) < 20, *decays)
        g = g.at[:, 20].set(-38.0)
    else:
        g = jnp.full_like(g, decays)
    q, k, v, d_o = ((x * size[:, None, None]).astype(dtype) for x in (q, k, v, d_o))
    return (q, k, v, g.astype(dtype), state), (d_o, d_state)


def check_uneven(run, dtype):
    """Check the gradient of the decay in every channel and in every token (see `oracle.relative_error`)."""
    drawn = [uneven(decays, dtype) for decays in UNEVEN]
    arrays, cotangents = jax.tree.map(lambda *parts: jnp.concatenate(parts), *drawn)
    _, d = run(Operands(*arrays[:4], initial_state=arrays[4]), cotangents, Scan(32**-0.5, (1, 64), "row"))
    exact = oracle.recurrence(arrays, cotangents)["dg"]
    terms = oracle.term_sizes(*jax.tree.map(lambda x: np.asarray(x, np.float64), (arrays, cotangents)))["dg"]
    # 16-bit rounding errors of a single channel or token average out less than those of an array.
    each = 1e-5 if dtype == "float32" else 1e-2
    for i, decays in enumerate(UNEVEN):
        one = slice(i, i + 1)
        for sizes, tolerance in ((None, TOLERANCE[dtype]), ([terms[one]], each)):
            oracle.assert_close([d.g[one]], [exact[one]], tolerance, [f"dg with decays {decays}"], sizes)


def check_irregular(run, dtype, value):
    """Check that NaN or infinities in k and v of tokens 40 and later do not reach the earlier ones.

    The later tokens are a segment of padding, or have no segment and gradients of zero.
    """
    (q, k, v, g, state), (d_o, d_state) = oracle.inputs(6, b=2, t=96, h=1, k=16, v=16, dtype=dtype)
    ids = np.zeros((2, 96), np.int32)
    ids[0, 40:] = 1
    d_o, d_state = d_o.at[:, 40:].set(0), jnp.zeros_like(d_state)
    # One program runs both: the first half of the batch has ones in these tokens.
    k, v = (jnp.concatenate([x.at[:, 40:].set(fill) for fill in (1.0, value)]) for x in (k, v))
    q, g, state, ids, d_o, d_state = (jnp.concatenate([x, x]) for x in (q, g, state, ids, d_o, d_state))
    operands = Operands(q, k, v, g, initial_state=state, segment_ids=ids)
    (o, _), d = run(operands, (d_o, d_state), Scan(0.25, (1, 96), "row"))
    results = (*(x[:, :40] for x in (o, d.q, d.k, d.v, d.g)), d.initial_state)
    expected, actual = zip(*(np.split(np.asarray(x, np.float64), 2) for x in results), strict=True)
    oracle.assert_close(actual, expected, TOLERANCE[dtype], ("o", "dq", "dk", "dv", "dg", "d_initial_state"))
