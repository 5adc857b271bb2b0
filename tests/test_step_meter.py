"""The times of a row belong to its steps, whenever the row is read."""

import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.training.telemetry import step_meter
from dig_jax.training.telemetry.step_meter import StepMeter


def step_metrics(loss=1.0, *, grad_norm=1.0, skipped=0, loss_sum=(0, 0, 0, 0), count=(0, 0, 0, 0)) -> dict:
    values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": 0.1, "skipped": skipped}
    return {name: jnp.asarray(value) for name, value in values.items()} | {
        "loss_sum": jnp.asarray(loss_sum, float),
        "count": jnp.asarray(count, float),
    }


def test_at_most_two_steps_are_in_flight(monkeypatch):
    waited_for = []
    monkeypatch.setattr(step_meter.jax, "block_until_ready", waited_for.append)
    meter, steps = StepMeter(batch_size=1), [step_metrics(loss) for loss in (1.0, 2.0, 3.0)]
    for number, step in enumerate(steps):
        meter.add(number, step)
        assert waited_for == steps[:number]


def test_a_row_has_the_means_over_its_steps_and_quarters():
    meter = StepMeter(batch_size=4)
    meter.add(1, step_metrics(1.0, grad_norm=2.0, loss_sum=(3, 1, 0, 0), count=(3, 1, 0, 0)))
    meter.add(2, step_metrics(2.0, grad_norm=4.0, loss_sum=(2, 0, 6, 0), count=(2, 0, 2, 0)))
    row = meter.take(2)
    assert row["loss"] == 1.5 and row["grad_norm"] == 3.0 and row["skipped_steps"] == 0
    assert row["learning_rate"] == pytest.approx(0.1)
    assert {name: row[name] for name in row if name.startswith("loss_q")} == {
        "loss_q1": 1.0,
        "loss_q2": 1.0,
        "loss_q3": 3.0,
    }
    meter.add(3, step_metrics(5.0))
    assert meter.take(3)["loss"] == 5.0


def test_a_row_has_no_metrics_of_later_steps(monkeypatch):
    waited_for = []
    meter, steps = StepMeter(batch_size=1), [step_metrics(loss) for loss in (1.0, 2.0, 3.0)]
    monkeypatch.setattr(step_meter.jax, "block_until_ready", waited_for.append)
    for number, metrics in enumerate(steps, 1):
        meter.add(number, metrics)
    assert meter.take(2)["loss"] == 1.5
    assert waited_for == steps[:2]
    assert meter.take(3)["loss"] == 3.0


def test_skipped_steps_in_a_row_are_counted_up_to_the_last_finished_step():
    meter, counts = StepMeter(batch_size=4), []
    for number, skipped in enumerate((1, 1, 0, 1, 0), 1):
        meter.add(number, step_metrics(skipped=skipped))
        counts.append(meter.skipped_in_a_row)
    assert counts == [0, 1, 2, 0, 1]
    meter.take(5)
    assert meter.skipped_in_a_row == 0


def test_a_skipped_step_is_counted_and_left_out_of_the_means(caplog):
    meter = StepMeter(batch_size=4)
    nan = float("nan")
    meter.add(1, step_metrics(1.0, loss_sum=(4, 0, 0, 0), count=(4, 0, 0, 0)))
    meter.add(2, step_metrics(nan, grad_norm=nan, skipped=1, loss_sum=(nan,) * 4, count=(1, 1, 1, 1)))
    row = meter.take(2)
    assert (row["loss"], row["grad_norm"], row["loss_q1"]) == (1.0, 1.0, 1.0)
    assert row["skipped_steps"] == 1 and "loss_q2" not in row
    assert "skipped 1 of the last 2 steps: loss, gradient or update was not finite" in caplog.text

    meter.add(3, step_metrics(nan, grad_norm=nan, skipped=1))
    row = meter.take(3)
    assert np.isnan(row["loss"]) and row["skipped_steps"] == 1


class Run:
    """A meter and simulated steps, on a simulated clock."""

    def __init__(self, monkeypatch):
        self.now, self.step, self.ends = 0.0, 0, {}  # ends: by id of the step's metrics
        monkeypatch.setattr(step_meter.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(step_meter.jax, "block_until_ready", self.wait)
        self.meter = StepMeter(batch_size=1)

    def wait(self, step: dict) -> None:
        self.now = max(self.now, self.ends[id(step)])

    def add(self, seconds: float, *, waiting: float = 0.0) -> None:
        """Dispatch a step once its data is there; it ends `seconds` after the previous step."""
        self.step += 1
        with self.meter.waiting_for_data():
            self.now += waiting
        metrics_of_step = step_metrics()
        self.ends[id(metrics_of_step)] = max([self.now, *self.ends.values()]) + seconds
        self.meter.add(self.step, metrics_of_step)

    def take(self) -> dict[str, float]:
        return self.meter.take(self.step)


@pytest.fixture
def run(monkeypatch):
    return Run(monkeypatch)


def test_a_rows_time_is_its_steps_time_although_it_is_read_later(run):
    run.add(2.0)
    run.add(2.0)
    assert run.take()["images_per_second"] == pytest.approx(0.5)
    run.now += 1.0  # the loop is busy while no step runs
    run.add(2.0, waiting=3.0)
    row = run.take()
    assert row["images_per_second"] == pytest.approx(1 / 6)
    assert row["data_wait"] == pytest.approx(3 / 6)


def test_a_pause_does_not_count_as_training_time(run):
    run.add(2.0, waiting=2.0)
    with run.meter.paused():
        run.now += 50.0
    run.add(6.0)
    row = run.take()
    assert row["images_per_second"] == pytest.approx(2 / 10)
    assert row["data_wait"] == pytest.approx(2 / 10)


def test_the_step_that_runs_when_a_pause_begins_counts(run):
    run.add(2.0)
    with run.meter.paused():
        assert run.now == 2.0
        run.now += 100.0
    run.add(2.0)
    assert run.take()["images_per_second"] == pytest.approx(0.5)


def test_a_slow_step_is_logged_with_its_wait_for_data(run, caplog):
    for _ in range(20):
        run.add(1.0)
    assert not caplog.messages
    run.add(1.0)
    run.add(1.0, waiting=4.0)
    run.add(1.0)
    (message,) = caplog.messages
    assert message.startswith(
        "step 21 took 4.00 s, 4.0 × the median of the last 20 steps (1.00 s); the loop waited 4.00 s for data"
    )


def test_a_pause_makes_no_step_slow(run, caplog):
    for _ in range(20):
        run.add(1.0)
    with run.meter.paused():
        run.now += 100.0
    run.add(1.0)
    run.take()
    assert not caplog.messages


def test_slow_steps_are_logged_once_per_row(run, caplog):
    for _ in range(20):
        run.add(1.0)
    for count in (1, 2):
        for _ in range(3):
            run.add(9.0)
        run.take()
        assert len(caplog.messages) == count


@pytest.mark.parametrize(("usual", "slow", "before"), [(0.01, 0.05, 20), (1.0, 2.9, 20), (1.0, 9.0, 9)])
def test_no_step_is_slow_by_milliseconds_or_right_after_the_start(run, caplog, usual, slow, before):
    for seconds in [*[usual] * before, slow]:
        run.add(seconds)
    run.take()
    assert not caplog.messages
