import json
import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_dry_run_checks_times_and_records_without_a_gpu(tmp_path):
    script = pathlib.Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    command = [sys.executable, script, f"--out={tmp_path}", "--dry-run", "--parts=check,time,fla"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *rows, peer = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert peer["part"] == "fla"
    assert "a peer needs a GPU" in peer["error"]
    assert {row["part"] for row in rows} == {"check", "time"}
    assert not [row for row in rows if "error" in row]
    assert all(row["ok"] for row in rows if row["part"] == "check")
    assert "of copy" in run.stdout
