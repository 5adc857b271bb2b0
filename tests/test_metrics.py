import contextlib
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dig_jax.errors import ConfigError, UserError
from dig_jax.training.telemetry import writer as metrics
from dig_jax.training.telemetry.wandb import WandbRun, require_wandb
from dig_jax.training.telemetry.writer import MetricWriter, StepMeter, details


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
        meter.add(number, step)
        assert waited_for == steps[:number]


def test_a_record_is_the_mean_over_its_steps_and_quarters():
    meter = StepMeter(batch_size=4)
    meter.add(1, step_metrics(1.0, grad_norm=2.0, loss_sum=(3, 1, 0, 0), count=(3, 1, 0, 0)))
    meter.add(1, step_metrics(2.0, grad_norm=4.0, loss_sum=(2, 0, 6, 0), count=(2, 0, 2, 0)))
    record = meter.take()
    assert record["loss"] == 1.5 and record["grad_norm"] == 3.0 and record["skipped_steps"] == 0
    assert record["learning_rate"] == pytest.approx(0.1)
    assert {name: record[name] for name in record if name.startswith("loss_q")} == {
        "loss_q1": 1.0,
        "loss_q2": 1.0,
        "loss_q3": 3.0,
    }
    meter.add(1, step_metrics(5.0))
    assert meter.take()["loss"] == 5.0


def test_a_skipped_step_is_counted_and_does_not_spoil_the_mean(caplog):
    meter = StepMeter(batch_size=4)
    nan = float("nan")
    meter.add(1, step_metrics(1.0, loss_sum=(4, 0, 0, 0), count=(4, 0, 0, 0)))
    meter.add(1, step_metrics(nan, grad_norm=nan, skipped=1, loss_sum=(nan,) * 4, count=(1, 1, 1, 1)))
    record = meter.take()
    assert (record["loss"], record["grad_norm"], record["loss_q1"]) == (1.0, 1.0, 1.0)
    assert record["skipped_steps"] == 1 and "loss_q2" not in record
    assert "1 of the last 2 steps were not finite and were skipped" in caplog.text

    meter.add(1, step_metrics(nan, grad_norm=nan, skipped=1))
    record = meter.take()
    assert np.isnan(record["loss"]) and record["skipped_steps"] == 1


class Run:
    """Steps that take as long as they are said to, on a clock of their own."""

    def __init__(self, monkeypatch):
        self.now, self.step, self.ends = 0.0, 0, {}
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(metrics.jax, "block_until_ready", self.wait)
        self.meter = StepMeter(batch_size=1)

    def wait(self, step: dict) -> None:
        self.now = max(self.now, self.ends[id(step)])

    def add(self, seconds: float, *, waiting: float = 0.0) -> None:
        """A step, dispatched when its data came, and done so many seconds after the one before."""
        self.step += 1
        with self.meter.waiting_for_data():
            self.now += waiting
        metrics_of_step = step_metrics()
        self.ends[id(metrics_of_step)] = max(self.now, *self.ends.values(), 0.0, 0.0) + seconds
        self.meter.add(self.step, metrics_of_step)


@pytest.fixture
def run(monkeypatch):
    return Run(monkeypatch)


def test_a_records_time_is_that_of_its_steps_though_it_is_read_later(run):
    run.add(2.0)
    run.add(2.0)
    assert run.meter.take()["images_per_second"] == pytest.approx(0.5)
    run.now += 1.0  # the loop does something else, while nothing runs
    run.add(2.0, waiting=3.0)
    record = run.meter.take()
    assert record["images_per_second"] == pytest.approx(1 / 6)
    assert record["data_wait"] == pytest.approx(3 / 6)


def test_what_is_no_training_does_not_count_as_its_time(run):
    run.add(2.0, waiting=2.0)
    with run.meter.paused():
        run.now += 50.0
    run.add(6.0)
    record = run.meter.take()
    assert record["images_per_second"] == pytest.approx(2 / 10)
    assert record["data_wait"] == pytest.approx(2 / 10)


def test_the_step_that_runs_when_training_pauses_is_training(run):
    run.add(2.0)
    with run.meter.paused():
        assert run.now == 2.0
        run.now += 100.0
    run.add(2.0)
    assert run.meter.take()["images_per_second"] == pytest.approx(0.5)


def test_a_slow_step_is_told_with_what_of_it_waited_for_data(run, caplog):
    for _ in range(20):
        run.add(1.0)
    assert not caplog.messages
    run.add(1.0)
    run.add(1.0, waiting=4.0)
    run.add(1.0)
    (message,) = caplog.messages
    assert message.startswith("step 21 took 4.00 s, 4.0 × the median of the 20 before (1.00 s); 4.00 s of it")


def test_no_step_is_slow_by_what_is_no_training(run, caplog):
    for _ in range(20):
        run.add(1.0)
    with run.meter.paused():
        run.now += 100.0
    run.add(1.0)
    run.meter.take()
    assert not caplog.messages


def test_slow_steps_are_told_once_per_record(run, caplog):
    for _ in range(20):
        run.add(1.0)
    for count in (1, 2):
        for _ in range(3):
            run.add(9.0)
        run.meter.take()
        assert len(caplog.messages) == count


@pytest.mark.parametrize(("usual", "slow", "before"), [(0.01, 0.05, 20), (1.0, 2.9, 20), (1.0, 9.0, 9)])
def test_no_step_is_slow_by_milliseconds_or_in_a_run_that_has_just_begun(run, caplog, usual, slow, before):
    for seconds in [*[usual] * before, slow]:
        run.add(seconds)
    run.meter.take()
    assert not caplog.messages


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


def test_tensorboard_gets_the_samples(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    with contextlib.closing(MetricWriter(tmp_path, first_step=0, tensorboard=True)) as writer:
        writer.picture(3, tmp_path / "samples.png")
        writer.picture(3, tmp_path / "of latents there is none.png")
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"samples" in events and b"PNG" in events


class Wandb(types.ModuleType):
    """Stands in for the package: keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.axes, self.finished = [], [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, *, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def Image(self, path):  # noqa: N802 (its name)
        return f"image of {path}"

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_records_and_samples_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    for first in (0, 1):
        run = WandbRun(tmp_path, project="digits", settings={"seed": 3})
        writer = MetricWriter(tmp_path, first_step=first, tensorboard=False, wandb=run)
        with contextlib.closing(writer):
            writer.write(first + 1, {"loss": 1.0, "grad_norm": float("nan")})
            writer.picture(first + 1, tmp_path / "samples.png")
    assert wandb.logged == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "samples": f"image of {tmp_path}/samples.png"},
        {"step": 2, "loss": 1.0},
        {"step": 2, "samples": f"image of {tmp_path}/samples.png"},
    ]
    first, second = wandb.started
    assert first == second and first["project"] == "digits" and first["resume"] == "allow"
    assert first["config"] == {"seed": 3} and first["dir"] == tmp_path
    assert wandb.axes == [("*", "step")] * 2 and wandb.finished == 2


def test_wandb_that_does_not_start_is_told_in_one_line(tmp_path, monkeypatch):
    wandb = Wandb()
    wandb.init = lambda **_: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=r"config.logging.wandb='x': division .*WANDB_MODE=offline"):
        WandbRun(tmp_path, project="x", settings={})


def test_without_the_package_wandb_cannot_be_asked_for(monkeypatch):
    require_wandb("")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb is not installed: pip install wandb"):
        require_wandb("digits")


def test_the_progress_line_shows_loss_and_speed_and_the_mfu_where_it_is_known():
    record = {"loss": 0.12345, "images_per_second": 321.0}
    assert details(record) == "loss 0.1235  321 images/s"
    assert details(record | {"mfu": 0.4567}) == "loss 0.1235  321 images/s  MFU 45.7%"
