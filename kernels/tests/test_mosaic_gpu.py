"""The Hopper kernel: results in interpret mode, and the code that Mosaic and ptxas generate."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import gpu_compiler
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from pallas_gla.mosaic_gpu import backend
from pallas_gla.scan import Gating, Operands, Scan

# One process compiles all cases; libraries read their environment at the start.
COMPILE = """
import json, os, pathlib, sys
root = pathlib.Path(sys.argv[1])
os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
import gpu_compiler, jax, jax.numpy as jnp
from pallas_gla.mosaic_gpu import backend
from pallas_gla.scan import Operands, Scan

def compile_case(number, grid, k, gate_dtype, direction, states):
    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=gpu_compiler.sharding("sm_90a"))

    (root / str(number)).mkdir()
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(root / str(number))
    tokens = grid[0] * grid[1]
    keys, values = array(4, tokens, 18, k), array(4, tokens, 18, 64)
    state = array(4, 18, k, 64, dtype="float32") if states else None
    operands = Operands(keys, keys, values, array(*keys.shape, dtype=gate_dtype), initial_state=state)
    scan = Scan(k**-0.5, tuple(grid), direction)
    assert backend.unsupported(operands, scan) is None
    forward = lambda operands: backend.forward(operands, scan, save=states)
    (root / f"{number}.hlo").write_text(jax.jit(forward).lower(operands).compile().as_text())

for number, case in enumerate(json.loads(sys.argv[2])):
    compile_case(number, *case[:-1])
"""
# Grid, K, dtype of g, direction, whether states are saved, and the most registers.
COMPILED = [
    ((16, 16), 32, "bfloat16", "row", False, 168),
    ((16, 16), 32, "bfloat16", "column_reversed", True, 168),
    ((64, 64), 64, "bfloat16", "row_reversed", True, 255),
]


def run(grid, k, gate, gate_dtype, direction, initial=True):
    """Return (o, final_state, states) and the oracle's, with tokens in scan order."""
    tokens = grid[0] * grid[1]
    arrays, _ = oracle.inputs(
        1, b=2, t=tokens, h=2, k=k, v=64, gate=gate, dtype="bfloat16", gate_dtype=gate_dtype
    )
    *arrays, state = arrays
    scan = Scan(k**-0.5, grid, direction, interpret=True)
    operands = Operands(*arrays, initial_state=state if initial else None)
    assert backend.unsupported(operands, scan) is None
    out, final_state, states = jax.jit(functools.partial(backend.forward, scan=scan, save=True))(operands)
    assert (out.dtype, final_state.dtype, states.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    index = oracle.scan_order(grid, direction)
    arrays = [np.asarray(x)[:, index] for x in arrays]
    state = np.asarray(state) if initial else np.zeros_like(state)
    entering = [state]
    for start in range(0, tokens - 64, 64):
        chunk = [x[:, start : start + 64] for x in arrays]
        entering.append(oracle.recurrence((*chunk, entering[-1]))["final_state"])
    entering = np.stack(entering, 1).transpose(0, 1, 4, 2, 3).reshape(states.shape)
    expected = [*oracle.recurrence((*arrays, state)).values(), entering]
    return [np.asarray(out)[:, index], final_state, states], expected


@pytest.mark.parametrize(
    ("grid", "k", "gate", "gate_dtype", "direction", "initial"),
    [
        ((1, 64), 32, "none", "bfloat16", "row", False),
        ((16, 8), 32, "strong", "float32", "column", True),
        ((16, 12), 64, "reset_60", "bfloat16", "column_reversed", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ((1, 256), 32, "dig", "bfloat16", "row_reversed", True),
                ((128, 1), 64, "dig", "float32", "column", False),
                ((64, 2), 32, "reset_1e4", "float32", "column_reversed", True),
            ]
        ),
    ],
)
def test_values_match_the_oracle(grid, k, gate, gate_dtype, direction, initial):
    actual, expected = run(grid, k, gate, gate_dtype, direction, initial)
    oracle.assert_close(actual, expected, 5e-3, ["o", "final_state", "states"])


def test_the_backward_pass_reads_the_saved_states():
    arrays, (d_out, d_state) = oracle.inputs(2, t=128, h=1, k=32, v=64, dtype="bfloat16")
    scan = Scan(32**-0.5, (1, 128), "row_reversed", interpret=True)

    @jax.jit
    def gradients(operands):
        states = backend.forward(operands, scan, save=True)[2]
        return backend.backward(operands, states, d_out, d_state, scan)

    *arrays, state = arrays
    actual = gradients(Operands(*arrays, initial_state=state))
    expected = list(oracle.recurrence((*arrays, state), (d_out, d_state), reverse=True).values())[2:]
    actual = [actual.q, actual.k, actual.v, actual.g, actual.initial_state]
    oracle.assert_close(actual, expected, 5e-3, oracle.NAMES[2:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 16}, "unsupported K: got 16; expected 32 or 64"),
        ({"v": 128}, "unsupported V: got 128; expected 64"),
        ({"dtype": "float16"}, "unsupported dtype of v: got float16; expected bfloat16"),
        ({"gate_dtype": "float16"}, "unsupported dtype of g: got float16; expected bfloat16 or float32"),
        ({"grid": (1, 65)}, "unsupported T: got 65; expected a multiple of 64"),
        (
            {"grid": (4, 32), "direction": "column"},
            r"unsupported rows in a column scan: got grid \(4, 32\); expected",
        ),
        ({"chunk_size": 32}, "unsupported chunk_size: got 32; expected None or 64"),
        ({"gating": Gating(16.0, 1e-6)}, "unsupported function: got gated_gla_2d; expected gla or gla_2d"),
        (
            {"segment_ids": jnp.zeros((1, 128), jnp.int32)},
            "unsupported segment_ids: got an array; expected None",
        ),
    ],
)
def test_unsupported_gives_the_reason(change, reason):
    case = {"k": 32, "v": 64, "dtype": "bfloat16", "gate_dtype": "bfloat16", "grid": (1, 128)} | change
    tokens = case["grid"][0] * case["grid"][1]
    keys, values, g = (
        jax.ShapeDtypeStruct((1, tokens, 1, case[width]), case[dtype])
        for width, dtype in (("k", "dtype"), ("v", "dtype"), ("k", "gate_dtype"))
    )
    operands = Operands(keys, keys, values, g, segment_ids=case.get("segment_ids"))
    names = ("direction", "chunk_size", "gating")
    scan = Scan(1.0, case["grid"], **{"direction": "row"} | {n: case[n] for n in names if n in case})
    assert re.match(reason, backend.unsupported(operands, scan))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile `COMPILED`; return the folder with what XLA and Mosaic made of each case."""
    if reason := gpu_compiler.missing():
        pytest.skip(reason)
    folder, root = tmp_path_factory.mktemp("mosaic"), pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", COMPILE, str(folder), json.dumps(COMPILED)]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'benchmarks'}"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize("number", range(len(COMPILED)), ids=lambda number: str(COMPILED[number]))
def test_it_compiles_for_hopper_without_spills(compiled, number):
    hlo = (compiled / f"{number}.hlo").read_text()
    assert hlo.count("custom-call(") == 1
    assert not re.search(r" (fusion|transpose|copy)\(", hlo)
    [report] = (file.read_text() for file in (compiled / str(number)).glob("*.ptxas"))
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}
    assert int(re.search(r"Used (\d+) registers", report)[1]) <= COMPILED[number][-1]
    assert "serialized" not in report
    [code] = (file.read_text() for file in (compiled / str(number)).glob("*.ptx"))
    assert "wgmma.mma_async" in code
    assert "cp.async.bulk.tensor" in code
