import contextlib
import io
import json
import logging
import os
import pty
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.training import metrics
from dig_jax.training.metrics import MetricWriter, Progress, StepMeter, duration


def step_metrics(loss=1.0, *, grad_norm=1.0, skipped=0, loss_sum=(0, 0, 0, 0), count=(0, 0, 0, 0)) -> dict:
    values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": 0.1, "skipped": skipped}
    return {name: jnp.asarray(value) for name, value in values.items()} | {
        "loss_sum": jnp.asarray(loss_sum, float),
        "count": jnp.asarray(count, float),
    }


def test_at_most_two_steps_are_in_flight(monkeypatch):
    waited_for = []
    monkeypatch.setattr(metrics.jax, "block_until_ready", waited_for.append)
    meter, steps = StepMeter(batch_size=1), [step_metrics(loss) for loss in (1.0, 2.0, 3.0)]
    for number, step in enumerate(steps):
        meter.add(step)
        assert waited_for == steps[:number]


def test_a_record_is_the_mean_over_its_steps_and_quarters():
    meter = StepMeter(batch_size=4)
    meter.add(step_metrics(1.0, grad_norm=2.0, loss_sum=(3, 1, 0, 0), count=(3, 1, 0, 0)))
    meter.add(step_metrics(2.0, grad_norm=4.0, loss_sum=(2, 0, 6, 0), count=(2, 0, 2, 0)))
    record = meter.take()
    assert record["loss"] == 1.5 and record["grad_norm"] == 3.0 and record["skipped_steps"] == 0
    assert record["learning_rate"] == pytest.approx(0.1)
    assert {name: record[name] for name in record if name.startswith("loss_q")} == {
        "loss_q1": 1.0,
        "loss_q2": 1.0,
        "loss_q3": 3.0,
    }
    meter.add(step_metrics(5.0))
    assert meter.take()["loss"] == 5.0


def test_a_skipped_step_is_counted_and_does_not_spoil_the_mean(caplog):
    meter = StepMeter(batch_size=4)
    nan = float("nan")
    meter.add(step_metrics(1.0, loss_sum=(4, 0, 0, 0), count=(4, 0, 0, 0)))
    meter.add(step_metrics(nan, grad_norm=nan, skipped=1, loss_sum=(nan,) * 4, count=(1, 1, 1, 1)))
    record = meter.take()
    assert (record["loss"], record["grad_norm"], record["loss_q1"]) == (1.0, 1.0, 1.0)
    assert record["skipped_steps"] == 1 and "loss_q2" not in record
    assert "1 of the last 2 steps were not finite and were skipped" in caplog.text

    meter.add(step_metrics(nan, grad_norm=nan, skipped=1))
    record = meter.take()
    assert np.isnan(record["loss"]) and record["skipped_steps"] == 1


def test_what_is_no_training_does_not_count_as_its_time(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 60.0, 60.0]).__next__
    monkeypatch.setattr(metrics.time, "monotonic", clock)
    meter = StepMeter(batch_size=8)  # at 0
    with meter.waiting_for_data():  # from 1 to 3
        pass
    with meter.paused():  # from 10 to 60
        pass
    meter.add(step_metrics())
    record = meter.take()  # at 60: 10 seconds of training
    assert record["images_per_second"] == pytest.approx(0.8)
    assert record["data_wait"] == pytest.approx(0.2)


def write(workdir, first_step: int, *records: tuple[int, dict]) -> list[dict]:
    with contextlib.closing(MetricWriter(workdir, first_step=first_step, tensorboard=False)) as writer:
        for step, record in records:
            writer.write(step, record)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, 0, (1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": 1.0}))
    assert write(tmp_path, 2, (3, {"loss": 1.5}), (4, {"loss": 1.0})) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 1.5},
        {"step": 4, "loss": 1.0},
    ]


@pytest.mark.parametrize(
    "garbage",
    [b'{"step": 2, "lo', b"3\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\xff\x00\n", b"\n"],
)
def test_garbage_in_the_metrics_is_dropped_and_told(tmp_path, garbage, caplog):
    good = b'{"step": 1, "loss": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + garbage)
    assert write(tmp_path, 5, (6, {"loss": 1.0})) == [{"step": 1, "loss": 3.0}, {"step": 6, "loss": 1.0}]
    assert "dropped 1 broken lines" in caplog.text


def test_numbers_that_json_lacks_become_null(tmp_path):
    record = {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 0.1}
    assert write(tmp_path, 0, (1, record)) == [
        {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.1}
    ]


def test_tensorboard_gets_what_is_finite(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path, first_step=0, tensorboard=True)) as writer:
        writer.write(1, {"loss": 1.0, "grad_norm": float("nan")})
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in events and b"grad_norm" not in events


RECORD = {"loss": 0.12345, "images_per_second": 321.0}
LINE = r"step 5/20  loss 0\.1235  321 images/s  ETA \d+:\d\d"


def test_progress_goes_to_the_log_where_there_is_no_terminal(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO, "dig_jax")
    with contextlib.closing(Progress(first_step=0, steps=20)) as progress:
        progress.show(5, RECORD)
    assert re.fullmatch(LINE, caplog.messages[0])
    assert sys.stderr.getvalue() == ""


def test_progress_is_rewritten_in_place_on_a_terminal(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dig_jax")
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with contextlib.closing(Progress(first_step=4, steps=20)) as progress:
            progress.show(5, RECORD)
            progress.show(5, RECORD)
        shown = os.read(controller, 1000).decode()
    os.close(controller)
    assert re.fullmatch(rf"(\r\x1b\[K{LINE}){{2}}\r\n", shown)
    assert not caplog.messages


def test_the_time_left_is_that_of_the_steps_of_this_start(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dig_jax")
    monkeypatch.setattr(metrics.time, "monotonic", iter([100.0, 130.0]).__next__)
    Progress(first_step=1000, steps=4000).show(1010, RECORD)  # 3 seconds per step
    assert caplog.messages[0].endswith("ETA 2:29:30")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3723.0, "1:02:03")]
)
def test_durations_are_written_as_on_a_clock(seconds, text):
    assert duration(seconds) == text
