import json
import pathlib
import subprocess
import sys

import gpu_checks
import gpu_jobs
import numpy as np
import pytest
from sass_schedule import LATENCY, WARPS, Instruction, cycles


def test_every_check_and_timing_has_its_own_name():
    checks = [check.name for check in gpu_checks.checks(quick=False)]
    assert len(checks) == len(set(checks))
    for tune in (False, True):
        timings = [(x.name, x.batch, x.tokens, x.heads, x.backward) for x in gpu_jobs.timings(False, tune)]
        assert len(timings) == len(set(timings))


@pytest.mark.parametrize("check", gpu_checks.small_checks(), ids=lambda check: check.name)
def test_every_kind_of_check_passes_in_interpret_mode(check):
    run = gpu_checks.lower(check, interpret=True)
    row = run.row(run.lowered.compile())
    assert row["ok"], row
    assert row["repeatable"]


def test_an_error_in_a_small_channel_is_found():
    expected = np.ones((1, 4, 1, 2)) * [1.0, 1e-6]
    runs = [[expected * [1.0, 1.1]]] * 2
    assert gpu_checks.compared(runs, {"dg": expected}, 1e-3)["ok"]
    assert not gpu_checks.compared(runs, {"dg": expected}, 1e-3, by_channel=("dg",))["ok"]


def test_timings_count_the_bytes_of_the_minimum():
    tangent = gpu_jobs.Timing(tangent=True)
    gated = gpu_jobs.Timing("gated_gla_2d", tangent=True)
    scan = gpu_jobs.Timing("selective_scan", backward=True)
    # In bfloat16: inputs and their tangents, and the output's tangent.
    assert tangent.bytes == 2 * (2 * (32 + 32 + 64 + 32) + 64)
    assert gated.bytes == tangent.bytes + 2 * 2 * 64
    # x, dt, z and y, then x, dt, z, the gradient of y and those of x, dt, z, of 64 channels.
    assert scan.bytes == 2 * 64 * (4 + 7)


@pytest.mark.slow
def test_a_dry_run_checks_times_and_records_without_a_gpu(tmp_path):
    script = pathlib.Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    command = [sys.executable, script, f"--out={tmp_path}", "--dry-run", "--parts=check,time,fla"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *rows, peer = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert peer["part"] == "fla"
    assert "peers need a GPU" in peer["error"]
    assert {row["part"] for row in rows} == {"check", "time"}
    assert not [row for row in rows if "error" in row]
    assert all(row["ok"] for row in rows if row["part"] == "check")
    assert "of copy" in run.stdout


def test_a_loop_takes_its_stalls_and_waits_for_loads_and_products():
    def instruction(text, stall, sets=7, waits_for=0):
        return Instruction(text, stall << 41 | sets << 46 | 7 << 49 | waits_for << 52)

    add = instruction("FADD R1, R1, R2 ;", stall=4)
    assert cycles([add, add, add]) == 12
    load = instruction("LDS R2, [R3] ;", stall=1, sets=0)
    use = instruction("FADD R1, R1, R2 ;", stall=4, waits_for=0b1)
    assert cycles([load, add, use]) == LATENCY["LDS"] + WARPS + use.stall
    product = instruction("HGMMA.64x64x16.F32.BF16 R24, R40, gdesc[UR8], R24 ;", stall=1)
    wait = instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", stall=1)
    assert cycles([product, product, wait]) - cycles([product, wait]) == 64 / 2
