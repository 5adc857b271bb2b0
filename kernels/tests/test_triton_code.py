"""The Triton kernels as compiled code: results of their PTX, run in NumPy, and their static cost."""

import functools
import json
import re

import gpu_compiler
import jax
import jax.numpy as jnp
import pytest
import static_gpu
from pallas_gla import gla_2d
from pallas_gla.triton import tuning
from ptx_traffic import CountingMachine
from triton_cases import (
    COVERING,
    GATED_COVERING,
    PRODUCT,
    check,
    check_gated,
    check_irregular,
    check_product,
    check_tangents,
    check_uneven,
    compiled,
    tangents,
)

pytestmark = pytest.mark.skipif(gpu_compiler.missing() is not None, reason=str(gpu_compiler.missing()))
GPUS = ("sm_90a", "sm_80")


def gates(case):
    """Weak decays, and for short scans also resets, which take the slow path token by token."""
    (rows, columns), *_ = case
    return ("dig",) if rows * columns > 100 else ("dig", "reset_1e4")


def on_gpus(cases, fast):
    """Parametrize over cases and GPUs; `fast` gives the GPU on which a case, by its number, is not slow."""
    return [
        pytest.param(gpu, case, id=f"{gpu}-{case}", marks=() if fast.get(number) == gpu else pytest.mark.slow)
        for number, case in enumerate(cases)
        for gpu in GPUS
    ]


@pytest.mark.parametrize(("gpu", "case"), on_gpus(COVERING, {1: "sm_90a", 5: "sm_80"}))
def test_values_and_gradients_match_the_oracle(gpu, case):
    check(compiled(gpu), *case, gates=gates(case), batch=1)


@pytest.mark.parametrize(
    ("gpu", "dtype"),
    [
        ("sm_90a", "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("sm_80", "bfloat16"), ("sm_90a", "float32"))
        ),
    ],
)
def test_the_decay_gradient_of_every_channel_and_token_is_accurate(gpu, dtype):
    check_uneven(compiled(gpu), dtype)


def test_nan_does_not_reach_earlier_tokens_or_other_segments():
    check_irregular(compiled("sm_90a"), "bfloat16", float("nan"))


def test_float32_matches_the_oracle():
    check(compiled("sm_90a"), (3, 7), 32, 32, *["float32"] * 2, "row_reversed", True, gates=("dig",), batch=1)


@pytest.mark.parametrize(("gpu", "case"), on_gpus(GATED_COVERING, {2: "sm_80"}))
def test_gated_scan_matches_the_oracle(gpu, case):
    # The norm cancels most of the gradients' terms, the more so the fewer tokens the state remembers.
    tolerance = 1e-5 if case[3] == "float32" else 1e-2
    check_gated(compiled(gpu), *case, strengths=(0.5, 30.0), batch=1, tolerance=tolerance)


@pytest.mark.parametrize(
    ("gpu", "grid", "dtype", "direction", "gated"),
    [
        ("sm_90a", (4, 16), "bfloat16", "column_reversed", False),
        pytest.param("sm_90a", (3, 7), "float32", "row", False, marks=pytest.mark.slow),
        pytest.param("sm_90a", (3, 7), "bfloat16", "column", True, marks=pytest.mark.slow),
        pytest.param("sm_80", (4, 16), "bfloat16", "column_reversed", False, marks=pytest.mark.slow),
    ],
)
def test_tangents_match_the_oracle(gpu, grid, dtype, direction, gated):
    check_tangents(compiled(gpu, function=tangents), grid, dtype, direction, gated)


@pytest.fixture
def parts(monkeypatch):
    """Split scans of few heads along T, two chunks a part."""
    monkeypatch.setattr(tuning, "gpu", lambda kind: tuning.GpuTuning(cores=1000, least_chunks=2))


@pytest.mark.parametrize(
    ("gpu", "dtype", "segmented"),
    [
        ("sm_90a", "bfloat16", True),
        pytest.param("sm_80", "bfloat16", False, marks=pytest.mark.slow),
        pytest.param("sm_90a", "float32", False, marks=pytest.mark.slow),
        pytest.param("sm_80", "float32", True, marks=pytest.mark.slow),
    ],
)
def test_a_scan_split_along_t_matches_the_oracle(parts, gpu, dtype, segmented):
    case = ((19, 23), 32, 64, dtype, dtype, "column_reversed", segmented)
    check(compiled(gpu), *case, gates=("dig",), batch=1)


@pytest.mark.slow
def test_tangents_of_a_scan_split_along_t_match_the_oracle(parts):
    check_tangents(compiled("sm_90a", function=tangents), (19, 23), "bfloat16", "column_reversed", False)


def test_forward_mode_runs_kernels_only_and_moves_no_array():
    keys, values = (jax.ShapeDtypeStruct((2, 256, 2, n), jnp.bfloat16) for n in (32, 64))
    arrays = (keys, keys, values, keys)
    scan = functools.partial(gla_2d, grid=(16, 16), direction="column")
    program = gpu_compiler.compile_for("sm_90a", lambda x, dots: jax.jvp(scan, x, dots), arrays, arrays)
    assert set(program.kernels) == {"gla_forward", "gla_tangent"}
    assert not re.search(r" (while|transpose|copy|dot)\(", program.hlo)


@pytest.mark.slow
def test_a_gated_scan_split_along_t_matches_the_oracle(parts):
    case = ((19, 23), 32, 64, "bfloat16", "row_reversed", False)
    check_gated(compiled("sm_80"), *case, strengths=(1.0,), batch=1, tolerance=1e-2)


def test_gradient_of_the_decay_does_not_drift_along_t():
    case = ((1, 1024), 32, 64, "bfloat16", "bfloat16", "row", False)
    check(compiled("sm_90a"), *case, gates=("dig",), batch=1)


def test_shared_memory_has_few_bank_conflicts_and_global_memory_is_read_and_written_in_whole_sectors():
    machines = []

    class Remembered(CountingMachine):
        def run(self, *arguments):
            machines.append(self)
            super().run(*arguments)

    case = ((4, 16), 32, 64, "bfloat16", "column_reversed", False)
    check_gated(compiled("sm_90a", Remembered), *case, strengths=(0.5,), batch=1, tolerance=1e-2)
    forward, ungate, backward = machines
    assert forward.wavefronts == forward.least_wavefronts > 0
    assert backward.wavefronts == backward.least_wavefronts > 0
    # Triton's layout of the gate and of the gradient of its product has two lanes per bank.
    assert 1.07 * ungate.least_wavefronts > ungate.wavefronts > 0
    for machine in machines:
        # Only the initial and final states are stored across rows.
        assert machine.bytes > 0.98 * 32 * machine.sectors > 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), list(enumerate(PRODUCT)), ids=str)
def test_product_of_sizes_dtypes_and_gates_in_changing_directions(number, case):
    check_product(compiled(GPUS[number % 2]), number, case)


def test_llvm_runs_its_symbolizer_only_without_the_environment_variable(monkeypatch, tmp_path):
    """The symbolizer would take most of a kernel's compilation time."""
    symbolizer, log = tmp_path / "llvm-symbolizer", tmp_path / "log"
    symbolizer.write_text(f"#!/bin/sh\necho called >> {log}\n")
    symbolizer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    case = static_gpu.Case("sm_90a", "forward", heads=1, batch=1)
    static_gpu.compile_case(case)
    assert not log.exists()
    monkeypatch.delenv("LLVM_DISABLE_SYMBOLIZATION")
    static_gpu.compile_case(case)
    assert log.exists()


COMPILED = [
    {"kind": "forward"},
    {"kind": "backward", "heads": 6, "side": 64, "batch": 1},
    {"kind": "forward+states", "direction": "column_reversed", "gated": True},
    {"kind": "forward+states", "heads": 6, "side": 64, "batch": 1},
    {"kind": "backward"},
    {"kind": "backward", "side": 64, "batch": 8, "gated": True},
]


@pytest.mark.parametrize(
    ("gpu", "cases"),
    [
        ("sm_90a", COMPILED),
        ("sm_80", COMPILED[:3:2]),
        pytest.param("sm_80", [COMPILED[1], *COMPILED[3:]], marks=pytest.mark.slow),
    ],
    ids=["sm_90a", "sm_80", "sm_80, the rest"],
)
def test_compiles_for_the_gpu_at_the_recorded_cost(gpu, cases):
    cases = [static_gpu.Case(gpu, **case) for case in cases]
    measured = {case.name: static_gpu.measure(case) for case in cases}
    if gpu == "sm_90a":
        for name, kernels in measured.items():
            for kernel, figures in kernels.items():
                # The backward kernel takes all registers; JAX 0.11.2 does not spill.
                # The path for any decay may spill.
                assert figures["spills"] == 0 or kernel == "gla_backward", (name, kernel)
                assert figures["loop_spills"] <= 0.02 * figures["loop"], (name, kernel)
                assert figures["wgmma"] > 0, (name, kernel)
                assert figures["loads_128"] > 0, (name, kernel)
                # Three programs share a core, or two in the backward pass of the scan.
                programs, registers = (2, 255) if kernel == "gla_backward" else (3, 168)
                assert figures["registers"] <= registers, (name, kernel)
                assert programs * (figures["shared"] + 1024) <= 233472, (name, kernel)
    if changed := static_gpu.compiler_changed():
        pytest.skip(f"no recorded figures for these compilers: {changed}")
    assert static_gpu.regressions(measured) == []


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_recorded_tangents_cost_at_most_2_2_forward_passes(gated, direction):
    record = json.loads(static_gpu.RECORD.read_text())
    forward = record[static_gpu.Case("sm_90a", "forward", gated=gated).name]["gla_forward"]
    tangent = record[static_gpu.Case("sm_90a", "tangent", gated=gated, direction=direction).name][
        "gla_tangent"
    ]
    # A forward pass takes less time to issue than its bytes take, so bytes limit both.
    assert tangent["bytes"] <= 1.8 * forward["bytes"]
    assert tangent["loop"] <= 2.2 * forward["loop"]


@pytest.mark.parametrize("gated", [False, True])
def test_the_pages_show_the_recorded_figures(gated):
    record, folder = json.loads(static_gpu.RECORD.read_text()), static_gpu.RECORD.parent
    summary, details = (folder.parent / "README.md").read_text(), (folder / "README.md").read_text()

    def shown(kind, *keys, direction="row"):
        kernels = record[static_gpu.Case("sm_90a", kind, gated=gated, direction=direction).name]
        names = sorted(kernels, reverse=True)  # the gate's kernel before the scan's
        return " | ".join(", ".join(f"{kernels[name][key]:,.0f}" for name in names) for key in keys)

    for kind in ("forward", "backward"):
        label = f"`{'gated_gla_2d' if gated else 'gla'}` {kind}"
        figures = shown(kind, "registers", "shared", "loop").replace(" | ", r" \| ")
        row = rf"^\| {label}[\w, ]* \| {figures} \|.*\| {shown(kind, 'bytes')}\b"
        assert re.search(row, summary, re.MULTILINE), label
    for direction in ("row", "column"):
        label = f"{'gated ' if gated else ''}tangent, {direction}"
        registers, spills, shared, loop, size = (
            shown("tangent", key, direction=direction)
            for key in ("registers", "spills", "shared", "loop", "bytes")
        )
        spills = spills if spills == "0" else f"{spills} B"
        assert f"| {label} | {registers} | {spills} | {shared} | {loop} " in details, label
        assert f" | {size} (" in details.partition(f"| {label} |")[2].partition("\n")[0], label
