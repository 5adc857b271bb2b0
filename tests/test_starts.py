import subprocess
from pathlib import Path

import pytest

from dig_jax.files.jsonl import read_rows
from dig_jax.training.telemetry.starts import note_start

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_a_start_names_the_commit_that_it_ran_from(tmp_path):
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    note_start(tmp_path, 0)
    (start,) = read_rows(tmp_path / "starts.jsonl")
    assert start["commit"].removesuffix("-dirty") == head
