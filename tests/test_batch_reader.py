import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ended_runs import environment

from dig_jax.checkpoints.reader import has_checkpoints
from dig_jax.training import batch_reader
from dig_jax.training.batch_reader import BatchReader

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gate():
    """An event that reads wait for; it is set at the end, so that no thread remains."""
    event = threading.Event()
    yield event
    event.set()


def hanging(gate, first=1):
    """Yield some batches, then hang."""
    for number in range(first):
        yield {"image": np.full(1, number)}
    gate.wait()
    yield {"image": np.full(1, first)}


def test_batches_arrive_in_order_and_errors_are_raised():
    def data():
        yield {"image": np.zeros(1)}
        yield {"image": np.ones(1)}
        raise OSError("the disk")

    reader = BatchReader(data(), lambda: True)
    assert [reader.read()["image"][0] for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk"):
        reader.read()
    reader.close()


def test_only_the_batch_that_was_asked_for_is_read():
    taken = []

    def data():
        for number in range(9):
            taken.append(number)
            yield {"image": np.zeros(1)}

    reader = BatchReader(data(), lambda: False)
    reader.read()
    reader.read()
    reader.close()
    assert taken == [0, 1]


def test_a_read_that_hangs_is_logged_and_ends_when_the_process_must_exit(gate, caplog, monkeypatch):
    caplog.set_level(logging.WARNING, "dig_jax")
    monkeypatch.setattr(batch_reader, "_LOOK", 0.01)
    monkeypatch.setattr(batch_reader, "_FIRST_LINE", 0.02)
    stop = threading.Event()
    reader = BatchReader(hanging(gate), stop.is_set)
    assert reader.read() is not None
    threading.Timer(0.3, stop.set).start()
    assert reader.read() is None
    assert caplog.messages[0] == "no batch for 0:00: the storage of the images does not answer"
    assert 2 <= len(caplog.messages) <= 5  # the intervals double


HANGING_CONFIG = """
import threading
from configs import smoke
from dig_jax.data.fake import FakeSource
from dig_jax.training import batch_reader

def get_config():
    c = smoke.get_config()
    c.model.name, c.model.depth, c.training.steps = "DiT-S/2", 1, 1000
    c.data.batch_size, c.checkpoint.every_steps = 4, 1000
    c.logging.heldout_every_steps = 1 if SPLIT == "heldout" else 0
    c.sampling.every_steps = c.evaluation.num_images = 0
    batch_reader._FIRST_LINE = 0.5
    read, reads = FakeSource.__getitem__, []
    def hang(self, index):
        if self.split == SPLIT:
            reads.append(index)
        if len(reads) > 100:
            threading.Event().wait()
        return read(self, index)
    FakeSource.__getitem__ = hang
    return c
"""


@pytest.mark.parametrize("split", ["train", pytest.param("heldout", marks=pytest.mark.slow)])
def test_sigterm_saves_the_last_step_while_a_read_hangs(tmp_path, split):
    (tmp_path / "hanging.py").write_text(f"SPLIT = {split!r}\n{HANGING_CONFIG}")
    command = [sys.executable, "main.py", f"--config={tmp_path}/hanging.py", f"--workdir={tmp_path}/run"]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    lines = []
    options = {"cwd": ROOT, "env": environment() | paths, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        limit = threading.Timer(240, process.kill)
        limit.start()
        for line in process.stderr:
            lines.append(line)
            if line.startswith("no batch for "):
                process.send_signal(signal.SIGTERM)
                sent = time.monotonic()
        limit.cancel()
    assert process.returncode == 1, lines
    assert time.monotonic() - sent < 60
    assert lines[-1].startswith("error: stopped while waiting for a batch, after saving step "), lines
    assert has_checkpoints(tmp_path / "run")
