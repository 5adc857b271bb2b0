"""The GPU kernels: values in interpret mode, and what the chips' compilers make of them."""

import functools
import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import static_gpu
from gla_test_base import GLATestBase
from pallas_gla import pallas_triton, tuning
from pallas_gla.scan import Gating, Operands, Scan, saved_shape

DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 5e-3}
GATING = Gating(4.0, 1e-3)


class TestTriton(GLATestBase):
    implementation = "triton"
    interpret = jax.default_backend() != "gpu"


@functools.partial(jax.jit, static_argnames="scan")
def run(operands, cotangents, scan):
    """Output, final state and gradients."""
    out, final_state, states = pallas_triton.forward(operands, scan, save=True)
    assert (states.shape, str(states.dtype)) == saved_shape(operands, scan)
    return (out, final_state), pallas_triton.backward(operands, states, *cotangents, scan)


def order(grid, direction):
    """Raster indices of the tokens as scanned."""
    index = np.arange(grid[0] * grid[1]).reshape(grid)
    index = (index.T if direction.startswith("column") else index).ravel()
    return index[::-1] if direction.endswith("reversed") else index


def segments(batch, tokens):
    starts = np.random.default_rng(0).random((batch, tokens)) < 0.06
    return np.cumsum(starts, axis=1).astype(np.int32)


def check(grid, k, v, dtype, gate_dtype, direction, segmented, gate, seed=0, batch=2, tolerance=None):
    """Compares `gla` in every value and gradient with the float64 recurrence."""
    tokens = grid[0] * grid[1]
    arrays, cotangents = oracle.inputs(
        seed, b=batch, t=tokens, h=2, k=k, v=v, gate=gate, dtype=dtype, gate_dtype=gate_dtype
    )
    *qkvg, state = arrays
    ids = segments(batch, tokens) if segmented else None
    index = order(grid, direction)
    scanned = None if ids is None else ids[:, index]
    d_out, d_state = cotangents
    expected = oracle.recurrence(
        (*(x[:, index] for x in qkvg), state), (d_out[:, index], d_state), segment_ids=scanned
    )
    operands = Operands(*qkvg, initial_state=state, segment_ids=None if ids is None else jnp.asarray(ids))
    (o, final_state), d = run(operands, cotangents, Scan(k**-0.5, grid, direction, interpret=True))
    gradients = (d.q, d.k, d.v, d.g)
    assert [x.dtype for x in (o, final_state, *gradients, d.initial_state)] == [
        jnp.dtype(x) for x in (dtype, "float32", dtype, dtype, dtype, gate_dtype, "float32")
    ]
    actual = [o[:, index], final_state, *(x[:, index] for x in gradients), d.initial_state]
    oracle.assert_close(actual, expected.values(), tolerance or TOLERANCE[dtype])


COVERING = [
    ((1, 1), 32, 64, "float32", "float32", "row", False),
    ((3, 5), 16, 32, "bfloat16", "float32", "column", False),
    ((7, 9), 60, 60, "float32", "float32", "row_reversed", True),
    ((4, 16), 64, 64, "float16", "float16", "column_reversed", False),
    ((5, 13), 64, 128, "float32", "float32", "column", True),
    ((10, 20), 32, 64, "bfloat16", "bfloat16", "column_reversed", True),
    ((1, 257), 32, 64, "bfloat16", "float32", "row", False),
]


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_values_and_gradients_equal_the_recurrence(case):
    for gate in oracle.GATES:
        check(*case, gate)


PRODUCT = itertools.product(
    [(1, 1), (3, 5), (7, 9), (4, 16), (5, 13), (10, 20), (1, 257), (20, 50)],
    [(32, 64), (16, 32), (64, 64), (64, 128), (60, 60), (128, 128)],
    TOLERANCE,
)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), list(enumerate(PRODUCT)), ids=str)
def test_product_of_sizes_dtypes_and_gates_in_changing_directions(number, case):
    grid, widths, dtype = case
    direction, segmented = DIRECTIONS[number % 4], number % 5 < 2
    gate_dtype = dtype if number % 7 < 4 else "float32"
    # float16 is rounded to bfloat16 for products, and a lone token's error is no mean over many.
    tolerance = 1e-2 if dtype == "float16" and grid == (1, 1) else None
    for gate in oracle.GATES:  # one compilation serves them all
        check(grid, *widths, dtype, gate_dtype, direction, segmented, gate, batch=1, tolerance=tolerance)
    jax.clear_caches()


def check_gated(grid, k, v, dtype, direction, segmented, strength, batch=2, gating=GATING, tolerance=None):
    """Compares `gated_gla_2d` with its formula in float64, around the float64 recurrence."""
    tokens, index = grid[0] * grid[1], order(grid, direction)
    (q, keys, values, noise, state), (d_out, d_state) = oracle.inputs(
        3, b=batch, t=tokens, h=2, k=k, v=v, gate="strong", dtype=dtype, gate_dtype=dtype
    )
    logits, out_gate = strength * noise, jnp.roll(d_out, 1, axis=1)
    weight = jnp.broadcast_to(jnp.linspace(0.5, 2, v, dtype=dtype), (batch, v))
    ids = segments(batch, tokens) if segmented else None
    scan = Scan(k**-0.5, grid, direction, gating=gating, interpret=True)
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
    oracle.assert_close(actual, expected, tolerance or TOLERANCE[dtype], names)


@pytest.mark.parametrize(
    "case",
    [
        ((5, 13), 32, 64, "float32", "column_reversed", True),
        ((10, 13), 32, 64, "bfloat16", "row", False),
        ((3, 7), 16, 60, "float16", "column", False),
    ],
    ids=str,
)
def test_gated_scan_equals_its_formula(case):
    # The norm cancels what gradients are made of, the more so the fewer tokens a decay lets o remember.
    tolerance = 1e-5 if case[3] == "float32" else 1e-2
    for strength in (0.5, 30.0):
        check_gated(*case, strength, tolerance=tolerance)


GATED_PRODUCT = itertools.product(
    [(3, 5), (7, 9), (4, 16), (10, 20), (1, 257)], [(32, 64), (16, 32), (64, 64), (60, 60)], TOLERANCE
)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), list(enumerate(GATED_PRODUCT)), ids=str)
def test_product_of_gated_scans_with_the_gates_of_dig(number, case):
    grid, widths, dtype = case
    tolerance = 7e-3 if dtype != "float32" and grid == (3, 5) else None
    for strength in (0.25, 1.0):
        options = {"batch": 1, "gating": Gating(16.0, 1e-6), "tolerance": tolerance}
        check_gated(grid, *widths, dtype, DIRECTIONS[number % 4], number % 5 < 2, strength, **options)
    jax.clear_caches()


def split_everything(monkeypatch):
    """Makes a scan of few heads fall into parts of two chunks."""
    many = tuning.GpuTuning(cores=1000, least_chunks=2)
    monkeypatch.setattr(tuning, "gpu", lambda kind: many)
    run.clear_cache()


@pytest.mark.parametrize("segmented", [False, True])
def test_a_scan_split_along_t_equals_the_recurrence(monkeypatch, segmented):
    split_everything(monkeypatch)
    for gate in ("dig", "reset_1e4"):
        check((19, 23), 32, 64, "float32", "float32", "column_reversed", segmented, gate)
    run.clear_cache()


def test_a_gated_scan_split_along_t_equals_its_formula(monkeypatch):
    split_everything(monkeypatch)
    check_gated((19, 23), 32, 64, "bfloat16", "row_reversed", False, 1.0, tolerance=1e-2)
    run.clear_cache()


def test_gradient_of_the_decay_does_not_drift_along_t():
    check((1, 2048), 32, 64, "bfloat16", "bfloat16", "row", False, "dig", batch=1)


def test_no_64_bit_numbers_appear_when_x64_is_on():
    with jax.enable_x64(True):
        arrays, cotangents = oracle.inputs(0, t=20, h=2, k=16, v=32, dtype="bfloat16")
        operands = Operands(*arrays[:4], initial_state=arrays[4], segment_ids=jnp.asarray(segments(2, 20)))
        scan = Scan(0.25, (4, 5), "column", interpret=True)
        assert "f64" not in str(jax.make_jaxpr(functools.partial(run, scan=scan))(operands, cotangents))
        check((4, 5), 16, 32, "bfloat16", "float32", "column", True, "strong")


def test_chunks_may_be_shorter():
    arrays, cotangents = oracle.inputs(1, t=40, h=1, k=16, v=16)
    scan = Scan(0.25, (1, 40), "row", chunk_size=16, interpret=True)
    (o, final_state), d = run(Operands(*arrays[:4], initial_state=arrays[4]), cotangents, scan)
    actual = [o, final_state, d.q, d.k, d.v, d.g, d.initial_state]
    oracle.assert_close(actual, oracle.recurrence(arrays, cotangents).values(), 1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 8}, "K must be from 16 to 128, got 8"),
        ({"v": 256}, "V must be from 16 to 128, got 256"),
        ({"dtype": "float8_e4m3fn"}, "v must be bfloat16, float16 or float32, got float8_e4m3fn"),
        ({"chunk_size": 8}, "chunk_size must be None or a power of two from 16, got 8"),
        ({}, None),
    ],
)
def test_says_what_it_does_not_support(change, reason):
    options = {"k": 32, "v": 64, "dtype": "bfloat16", "chunk_size": None} | change
    keys, values = (jax.ShapeDtypeStruct((1, 20, 2, options[name]), options["dtype"]) for name in ("k", "v"))
    scan = Scan(1.0, (1, 20), "row", options["chunk_size"])
    assert pallas_triton.unsupported(Operands(keys, keys, values, keys), scan) == reason


def test_lowers_for_a_gpu_without_one_and_without_a_warning():
    arrays, _ = oracle.inputs(0, t=64, h=2, k=32, v=64, dtype="bfloat16")
    scan = Scan(0.2, (8, 8), "column")
    forward = jax.jit(lambda *arrays: pallas_triton.forward(Operands(*arrays), scan, save=False)[0])
    assert "triton" in forward.trace(*arrays[:4]).lower(lowering_platforms=("cuda",)).as_text()


def test_long_scans_of_few_heads_are_split():
    h200 = tuning.gpu("NVIDIA H200")
    assert [h200.parts(18 * batch, 16) for batch in (32, 1)] == [1, 1]
    assert h200.parts(18, 256) == 14
    assert h200.parts(18 * 8, 256) == 1
    assert tuning.gpu("NVIDIA Nothing") == tuning.gpu(None) == h200


COMPILED = [
    {"kind": "forward"},
    {"kind": "forward+states", "heads": 6, "side": 64, "batch": 1},
    {"kind": "backward"},
    {"kind": "backward", "heads": 6, "side": 64, "batch": 1},
    {"kind": "forward+states", "direction": "column_reversed", "gated": True},
    {"kind": "backward", "side": 64, "batch": 8, "gated": True},
]


@pytest.mark.parametrize("gpu", ["sm_90a", "sm_80"])
def test_compiles_for_the_gpu_at_the_recorded_cost(gpu):
    if reason := static_gpu.missing():
        pytest.skip(reason)
    cases = json.dumps([{"gpu": gpu} | case for case in COMPILED])
    # In a process of its own, because the compiler's options are read once.
    process = subprocess.run(
        [sys.executable, static_gpu.__file__, "--json", cases], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout)
    if gpu == "sm_90a":
        for name, kernels in measured.items():
            for kernel, figures in kernels.items():
                assert figures["spills"] == 0, (name, kernel)
                assert figures["wgmma"] > 0, (name, kernel)
                assert figures["loads_128"] > 0, (name, kernel)
                if kernel == "gla_forward" and " gla " in name:
                    assert figures["registers"] <= 168, name
    if changed := static_gpu.compiler_changed():
        pytest.skip(f"no figures to compare with: {changed}")
    assert static_gpu.regressions(measured) == []
