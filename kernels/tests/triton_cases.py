"""Cases for the GPU kernels, what they are compared with, and two ways to run them without a GPU."""

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
# Every option at least once: grid, K, V, dtype, dtype of the decay, direction, whether there are segments.
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
    """Output, final state and gradients."""
    out, final_state, states = backend.forward(operands, scan, save=True)
    assert (states.shape, str(states.dtype)) == saved_shape(operands, scan)
    return (out, final_state), backend.backward(operands, states, *cotangents, scan)


@functools.partial(jax.jit, static_argnames="scan")
def interpreted(operands: Operands, cotangents: tuple, scan: Scan) -> tuple:
    """`forward_and_backward` by JAX, without Triton."""
    return forward_and_backward(operands, cotangents, dataclasses.replace(scan, interpret=True))


def compiled(gpu: str, machine: type[Machine] = Machine) -> Callable[..., tuple]:
    """`forward_and_backward` by the PTX that Triton makes for a GPU, which a machine in NumPy runs."""

    def run(operands: Operands, cotangents: tuple, scan: Scan) -> tuple:
        replacement = functools.partial(_call_compiled, gpu, machine, call.call)
        with mock.patch.object(call, "call", replacement):
            return forward_and_backward(operands, cotangents, scan)

    return run


def _call_compiled(gpu, machine, original, kernel, arrays, results, *, programs, **options):
    def launch(*arrays):
        return original(kernel, arrays, results, programs=programs, **options)

    [code] = gpu_compiler.compile_for(gpu, launch, *arrays).kernels.values()
    # What a kernel does not write is seen.
    outputs = [np.full(shape, np.nan, jnp.dtype(dtype)) for shape, dtype in results]
    machine(code.ptx, code.threads, code.shared).run([*map(np.array, arrays), *outputs], programs)
    return [jnp.asarray(x) for x in outputs]


def order(grid, direction):
    """Raster indices of the tokens as scanned."""
    index = np.arange(grid[0] * grid[1]).reshape(grid)
    index = (index.T if direction.startswith("column") else index).ravel()
    return index[::-1] if direction.endswith("reversed") else index


def segments(batch, tokens):
    starts = np.random.default_rng(0).random((batch, tokens)) < 0.06
    return np.cumsum(starts, axis=1).astype(np.int32)


def assert_each_close(actual, expected, tolerance, names, kinds, batch):
    """By kind of decay, of which each has as many elements of the batch."""
    for i, kind in enumerate(kinds):
        one = slice(i * batch, (i + 1) * batch)
        labels = [f"{name} with decays {kind}" for name in names]
        oracle.assert_close([x[one] for x in actual], [x[one] for x in expected], tolerance, labels)


def check(
    run, grid, k, v, dtype, gate_dtype, direction, segmented, gates=oracle.GATES, batch=2, tolerance=None
):
    """Compares `gla` in every value and gradient with the float64 recurrence."""
    tokens = grid[0] * grid[1]
    options = {"b": batch, "t": tokens, "h": 2, "k": k, "v": v, "dtype": dtype, "gate_dtype": gate_dtype}
    drawn = [oracle.inputs(0, gate=gate, **options) for gate in gates]
    arrays, cotangents = jax.tree.map(lambda *parts: jnp.concatenate(parts), *drawn)
    *qkvg, state = arrays
    ids = segments(len(state), tokens) if segmented else None
    index = order(grid, direction)
    scanned = None if ids is None else ids[:, index]
    d_out, d_state = cotangents
    expected = oracle.recurrence(
        (*(x[:, index] for x in qkvg), state), (d_out[:, index], d_state), segment_ids=scanned
    )
    operands = Operands(*qkvg, initial_state=state, segment_ids=None if ids is None else jnp.asarray(ids))
    (o, final_state), d = run(operands, cotangents, Scan(k**-0.5, grid, direction))
    gradients = (d.q, d.k, d.v, d.g)
    assert [x.dtype for x in (o, final_state, *gradients, d.initial_state)] == [
        jnp.dtype(x) for x in (dtype, "float32", dtype, dtype, dtype, gate_dtype, "float32")
    ]
    actual = [o[:, index], final_state, *(x[:, index] for x in gradients), d.initial_state]
    assert_each_close(actual, expected.values(), tolerance or TOLERANCE[dtype], oracle.NAMES, gates, batch)


def check_product(run, number, case):
    """`check` of one of `PRODUCT`, in a direction and with a decay that its number chooses."""
    grid, widths, dtype = case
    gate_dtype = dtype if number % 7 < 4 else "float32"
    # float16 is rounded to bfloat16 for products, and a lone token's error is no mean over many.
    tolerance = 1e-2 if dtype == "float16" and grid == (1, 1) else None
    options = {"batch": 1, "tolerance": tolerance}
    check(run, grid, *widths, dtype, gate_dtype, DIRECTIONS[number % 4], number % 5 < 2, **options)


def check_gated(
    run, grid, k, v, dtype, direction, segmented, strengths, batch=2, gating=GATING, tolerance=None
):
    """Compares `gated_gla_2d` with its formula in float64, around the float64 recurrence."""
    tokens, index = grid[0] * grid[1], order(grid, direction)
    options = {"b": batch, "t": tokens, "h": 2, "k": k, "v": v, "dtype": dtype, "gate_dtype": dtype}
    drawn = [oracle.inputs(3, gate="strong", **options) for _ in strengths]
    (q, keys, values, noise, state), (d_out, d_state) = jax.tree.map(lambda *x: jnp.concatenate(x), *drawn)
    strength = jnp.repeat(jnp.asarray(strengths, dtype), batch)
    logits, out_gate = strength[:, None, None, None] * noise, jnp.roll(d_out, 1, axis=1)
    weight = jnp.broadcast_to(jnp.linspace(0.5, 2, v, dtype=dtype), (len(state), v))
    ids = segments(len(state), tokens) if segmented else None
    scan = Scan(k**-0.5, grid, direction, gating=gating)
    operands = Operands(
        q, keys, values, logits, out_gate, weight, state, None if ids is None else jnp.asarray(ids)
    )
    (out, final_state), d = run(operands, (d_out, d_state), scan)
    with jax.enable_x64(True):
        logits, out_gate, weight, d_out = (
            jnp.asarray(np.asarray(x, np.float64)) for x in (logits, out_gate, weight, d_out)
        )
        g, to_logits = jax.vjp(lambda x: jax.nn.log_sigmoid(x) / gating.normalizer, logits)
        arrays = [np.asarray(x, np.float64)[:, index] for x in (q, keys, values, g)] + [state]
        scanned = None if ids is None else ids[:, index]
        inverse = np.argsort(index)
        o = oracle.recurrence(arrays, segment_ids=scanned)["o"][:, inverse]

        def output(o, out_gate, weight):
            o = o * jax.lax.rsqrt(jnp.mean(jnp.square(o), axis=-1, keepdims=True) + gating.eps)
            return o * weight[:, None, None] * out_gate * jax.nn.sigmoid(out_gate)

        expected_out, to_inputs = jax.vjp(output, jnp.asarray(o), out_gate, weight)
        d_o, d_gate, d_weight = to_inputs(d_out)
        results = oracle.recurrence(arrays, (np.asarray(d_o)[:, index], d_state), segment_ids=scanned)
        raster = {name: results[name][:, inverse] for name in ("dq", "dk", "dv", "dg")}
        expected = [expected_out, results["final_state"], *list(raster.values())[:3]]
        expected += [to_logits(jnp.asarray(raster["dg"]))[0], d_gate, d_weight, results["dinitial_state"]]
    names = ["out", "final_state", "dq", "dk", "dv", "dlogits", "dgate", "dweight", "dstate"]
    actual = [out, final_state, d.q, d.k, d.v, d.g, d.out_gate, d.norm_weight, d.initial_state]
    assert_each_close(actual, expected, tolerance or TOLERANCE[dtype], names, strengths, batch)
