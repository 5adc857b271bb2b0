import json
import pathlib
import subprocess
import sys

import gpu_jobs
import pytest


def test_every_check_and_timing_has_its_own_name():
    checks = [check.name for check in gpu_jobs.checks(quick=False)]
    assert len(checks) == len(set(checks))
    for tune in (False, True):
        timings = [(x.name, x.batch, x.tokens, x.heads, x.backward) for x in gpu_jobs.timings(False, tune)]
        assert len(timings) == len(set(timings))


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
