"""Each hook of the training loop on its own, without a network."""

import contextlib
import dataclasses
from pathlib import Path
from unittest import mock

import pytest

from dig_jax.errors import StalledRead, UserError
from dig_jax.progress import Progress
from dig_jax.testing import tiny_settings
from dig_jax.training import hooks
from dig_jax.training.hooks import StepEvent, progress_text
from dig_jax.training.telemetry.profiler import Profiler
from dig_jax.training.telemetry.step_meter import StepMeter
from dig_jax.training.telemetry.writer import MetricWriter

LAST = 10


class Meter(StepMeter):
    """A meter that stores its calls."""

    def __init__(self, calls):
        super().__init__(batch_size=8)
        self.calls, self.is_paused = calls, False

    @contextlib.contextmanager
    def paused(self):
        self.is_paused = True
        yield
        self.is_paused = False

    def take(self, last):
        self.calls.append(("take", last))
        return {"loss": 1.0, "images_per_second": 2.0}


@pytest.fixture
def calls():
    return []


@pytest.fixture
def meter(calls):
    return Meter(calls)


@pytest.fixture
def metrics(calls, meter):
    writer, progress = mock.create_autospec(MetricWriter), mock.create_autospec(Progress)
    writer.write.side_effect = lambda step, row: calls.append(("write", step, row))
    progress.close.side_effect = lambda: calls.append(("close",))
    return hooks.WriteMetrics(3, meter, writer, progress, lambda row: {"mfu": row["loss"] / 2})


def event(step, **fields):
    return StepEvent(step, {"number": step}, last=LAST, examples=8 * step, **fields)


def run(hook, steps=range(1, LAST + 1)):
    """Call a hook as the loop does; return the events."""
    events = [event(step) for step in steps]
    for step_event in events:
        hook.before_step(step_event.step)
        hook.after_step(step_event)
    hook.close()
    return events


@pytest.mark.parametrize(("every", "due"), [(3, [3, 6, 9, 10]), (5, [5, 10]), (99, [10]), (None, [])])
def test_an_interval_includes_the_last_step_and_may_be_off(every, due):
    assert [step for step in range(1, LAST + 1) if event(step).is_due(every)] == due


def test_the_trace_starts_before_its_first_and_stops_after_its_last_step_while_the_meter_pauses(calls, meter):
    profiler = mock.create_autospec(Profiler)
    profiler.starts_at.side_effect = lambda step: step == 4
    profiler.stops_at.side_effect = lambda step: step == 6
    profiler.start.side_effect = lambda: calls.append(("start", meter.is_paused))
    profiler.stop.side_effect = lambda: calls.append(("stop", meter.is_paused))
    profiler.close.side_effect = lambda: calls.append(("close",))
    hook = hooks.ProfileSteps(profiler, meter)
    for step in range(1, 8):
        hook.before_step(step)
        calls.append(step)
        hook.after_step(event(step))
    hook.close()
    assert calls == [1, 2, 3, ("start", True), 4, 5, 6, ("stop", True), 7, ("close",)]


def test_the_heldout_loss_is_computed_when_due_while_the_meter_pauses(meter):
    paused = []

    def compute(state, must_exit):
        paused.append(meter.is_paused)
        return float(state["number"])

    events = run(hooks.ComputeHeldoutLoss(4, compute, meter))
    assert {e.step: e.heldout_loss for e in events if e.heldout_loss is not None} == {
        4: 4.0,
        8: 8.0,
        10: 10.0,
    }
    assert paused == [True] * 3


def test_a_heldout_read_that_hangs_ends_the_run_if_the_process_must_exit(meter):
    def compute(state, must_exit):
        if must_exit():
            raise StalledRead("no held-out image")
        return 1.0

    hook, ended = hooks.ComputeHeldoutLoss(1, compute, meter), event(3, must_exit=lambda: True)
    hook.after_step(ended)
    assert (ended.stalled, ended.preempted, ended.heldout_loss) == (True, True, None)


def test_a_row_is_written_one_step_late(calls, metrics):
    for step in range(1, 5):
        calls.append(step)
        metrics.after_step(event(step))
    row = {"loss": 1.0, "images_per_second": 2.0, "mfu": 0.5}
    assert calls == [1, 2, 3, 4, ("take", 3), ("write", 3, row)]


def test_a_step_with_a_heldout_loss_gets_a_row(calls, metrics):
    metrics.after_step(event(1, heldout_loss=0.25))
    metrics.after_step(event(2))
    assert calls[-1][:2] == ("write", 1) and calls[-1][2]["heldout_loss"] == 0.25


def test_a_row_that_was_written_early_is_not_written_again(calls, metrics):
    metrics.after_step(event(3))
    metrics.write(event(3))
    metrics.after_step(event(4))
    metrics.close()
    assert [call[0] for call in calls] == ["take", "write", "close"]


def save_hook(calls, metrics, meter, **settings):
    def save(step_event):
        calls.append(("save", step_event.step, meter.is_paused))

    settings = dataclasses.replace(tiny_settings(checkpoint__every_steps=4).checkpoint, **settings)
    return hooks.SaveCheckpoint(settings, 2, 0, save, metrics, meter)


def saved(calls):
    return [call[1] for call in calls if call[0] == "save"]


def test_a_row_is_written_before_its_step_is_saved(calls, metrics, meter):
    events = run(save_hook(calls, metrics, meter))
    assert [call[:2] for call in calls] == [
        (what, step) for step in (4, 8, 10) for what in ("take", "write", "save")
    ]
    assert all(call[2] for call in calls if call[0] == "save")
    assert [e.step for e in events if e.has_new_files] == [4, 8, 10]


def test_a_preempted_step_is_saved(calls, metrics, meter):
    hook = save_hook(calls, metrics, meter, every_steps=1000)
    hook.after_step(event(1))
    hook.after_step(event(2, preempted=True))
    assert saved(calls) == [2]


def collapse_hook(saving, metrics, meter, limit=3):
    return hooks.EndCollapsedRun(limit, Path("run/checkpoints"), saving, metrics, meter)


def run_with_skipped(skipped, calls, metrics, meter, **settings):
    """Save and end as the loop does, while the steps in `skipped` are skipped."""
    saving = save_hook(calls, metrics, meter, **settings)
    ending = collapse_hook(saving, metrics, meter)
    for step in range(1, LAST + 1):
        meter.skipped_in_a_row = meter.skipped_in_a_row + 1 if step in skipped else 0
        saving.after_step(event(step))
        ending.after_step(event(step))


def test_nothing_is_saved_while_steps_are_skipped(calls, metrics, meter):
    run_with_skipped({3, 4, 7}, calls, metrics, meter, every_steps=1)
    assert saved(calls) == [1, 2, 5, 6, 8, 9, 10]


def test_one_skipped_step_at_the_end_is_saved(calls, metrics, meter):
    run_with_skipped({LAST}, calls, metrics, meter, every_steps=5)
    assert saved(calls) == [5, LAST]


@pytest.mark.parametrize(
    ("skipped", "steps", "kept"),
    [
        ({5, 6, 7, 8}, 3, "the last good checkpoint is run/checkpoints/4"),
        ({9, 10}, 2, "the last good checkpoint is run/checkpoints/8"),
        ({1, 2, 3, 4}, 3, "no checkpoint was saved before"),
    ],
)
def test_a_run_that_only_skips_steps_ends_and_names_the_last_good_checkpoint(
    calls, metrics, meter, skipped, steps, kept
):
    with pytest.raises(
        UserError, match=f"not finite in the last {steps} steps; {kept}. Run again with a lower"
    ):
        run_with_skipped(skipped, calls, metrics, meter)
    assert saved(calls) == [step for step in (4, 8) if step < min(skipped)]


def test_a_collapsed_run_that_is_preempted_ends_too(calls, metrics, meter):
    saving = save_hook(calls, metrics, meter)
    meter.skipped_in_a_row = 2
    saving.after_step(event(3, preempted=True))
    with pytest.raises(UserError, match="collapsed"):
        collapse_hook(saving, metrics, meter).after_step(event(3, preempted=True))
    assert saved(calls) == []


def test_a_save_by_time_waits_for_a_step_that_checks_it(calls, metrics, meter, monkeypatch):
    now = 0.0
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now)
    hook = save_hook(calls, metrics, meter, every_steps=1000, every_minutes=1.0)
    for step in range(1, 9):
        now += 25.0
        hook.after_step(event(step))
    assert saved(calls) == [4, 8]  # after 100 and 200 seconds; at steps 2 and 6 only 50 have passed


def test_processes_agree_on_a_save_by_time(calls, metrics, meter, monkeypatch):
    """Their clocks differ, so process 0 decides."""
    for answer in (True, False):
        monkeypatch.setattr(hooks, "on_process_0", lambda compute, answer=answer: answer)
        save_hook(calls, metrics, meter, every_steps=1000, every_minutes=60.0).after_step(event(2))
        assert saved(calls) == [2]


def test_samples_are_drawn_between_steps_but_not_at_the_end(meter):
    drawn = []
    hook = hooks.DrawSamples(5, lambda state: drawn.append((state["number"], meter.is_paused)), meter)
    events = run(hook)
    hook.after_step(event(5, preempted=True))
    assert drawn == [(5, True)]
    assert [e.step for e in events if e.has_new_files] == [5]


def test_the_report_is_written_when_there_are_new_files(tmp_path, meter, monkeypatch):
    written = []
    monkeypatch.setattr(hooks, "write_report", written.append)
    hook = hooks.WriteReport(tmp_path, meter)
    hook.after_step(event(1))
    assert not written
    hook.after_step(event(2, has_new_files=True))
    assert written == [tmp_path]


def test_a_report_that_fails_is_logged_and_does_not_end_the_run(tmp_path, meter, monkeypatch, caplog):
    monkeypatch.setattr(hooks, "write_report", lambda workdir: 1 / 0)
    hooks.WriteReport(tmp_path, meter).after_step(event(2, has_new_files=True))
    assert caplog.messages == ["could not write report.html: ZeroDivisionError: division by zero"]


def test_the_progress_line_shows_loss_speed_and_mfu_if_known():
    row = {"loss": 0.12345, "images_per_second": 321.0}
    assert progress_text(row) == "loss 0.1235  321 images/s"
    assert progress_text(row | {"mfu": 0.4567}) == "loss 0.1235  321 images/s  MFU 45.7%"


def test_scores_are_computed_every_n_steps_and_at_the_last_one_but_not_before_an_exit(meter):
    paused = []

    def compute(state):
        paused.append(meter.is_paused)
        return {"fid": float(state["number"])}

    events = run(hooks.ComputeScores(4, compute, meter))
    assert {e.step: e.scores for e in events if e.scores} == {n: {"fid": float(n)} for n in (4, 8, LAST)}
    assert all(paused)
    preempted = event(4, preempted=True)
    hooks.ComputeScores(4, compute, meter).after_step(preempted)
    assert not preempted.scores


def test_a_step_with_scores_gets_a_row_of_metrics(metrics, calls):
    metrics.after_step(event(1, scores={"fid": 5.0}))
    metrics.write_pending()
    (row,) = [call[2] for call in calls if call[0] == "write"]
    assert row["fid"] == 5.0


def test_checkpoints_are_compared_by_the_held_out_loss_or_a_score():
    measured = event(1, heldout_loss=0.5, scores={"fid": 5.0, "is": 9.0})
    assert measured.metric("heldout_loss", higher_is_better=False) == 0.5
    assert measured.metric("fid", higher_is_better=False) == 5
    assert measured.metric("is", higher_is_better=True) == -9
    assert measured.metric("kid", higher_is_better=False) is None
    assert event(1).metric("heldout_loss", higher_is_better=False) is None
