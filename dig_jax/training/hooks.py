"""Hooks: actions between training steps.

Each hook does one thing and can be tested without a network. `make_hooks` lists them in the order in which
the loop calls them.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax

from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.config import CheckpointConfig
from dig_jax.errors import StalledRead, UserError, one_line
from dig_jax.evaluation.registry import rankings
from dig_jax.files import paths
from dig_jax.parallel import on_process_0
from dig_jax.progress import Progress
from dig_jax.reporting.html import write_report
from dig_jax.reporting.sample_grids import draw_samples
from dig_jax.sampling.sampler import Sampler
from dig_jax.training.heldout import HeldoutLoss
from dig_jax.training.hook import Hook, StepEvent
from dig_jax.training.run import Run
from dig_jax.training.state import State
from dig_jax.training.telemetry.profiler import ProfiledSteps, Profiler
from dig_jax.training.telemetry.step_meter import Row, StepMeter
from dig_jax.training.telemetry.utilization import BestTimes, peak_memory
from dig_jax.training.telemetry.writer import MetricWriter

log = logging.getLogger(__name__)


class ProfileSteps(Hook):
    """Hook that traces the requested steps."""

    def __init__(self, profiler: Profiler, meter: StepMeter):
        self._profiler, self._meter = profiler, meter

    def before_step(self, step: int) -> None:
        """Start the trace before its first step."""
        if self._profiler.starts_at(step):
            with self._meter.paused():
                self._profiler.start()

    def after_step(self, event: StepEvent) -> None:
        """Write the trace after its last step."""
        if self._profiler.stops_at(event.step):
            with self._meter.paused():
                self._profiler.stop()

    def close(self) -> None:
        """End a trace whose last step was not reached."""
        self._profiler.close()


class ComputeHeldoutLoss(Hook):
    """Hook that computes the held-out loss every N steps, for metrics and the choice of checkpoints."""

    def __init__(
        self,
        every_steps: int | None,
        compute: Callable[[State, Callable[[], bool]], float | None],
        meter: StepMeter,
    ):
        self._every_steps, self._compute, self._meter = every_steps, compute, meter

    def after_step(self, event: StepEvent) -> None:
        """Compute the loss if it is due; a read that hangs ends the run if the process must exit."""
        if event.is_due(self._every_steps) and not event.stalled:
            try:
                with self._meter.paused():
                    event.heldout_loss = self._compute(event.state, event.must_exit)
            except StalledRead:
                event.stalled = event.preempted = True


class ComputeScores(Hook):
    """Hook that scores generated images every N steps, for metrics and the choice of checkpoints."""

    def __init__(
        self, every_steps: int | None, compute: Callable[[State], dict[str, float]], meter: StepMeter
    ):
        self._every_steps, self._compute, self._meter = every_steps, compute, meter

    def after_step(self, event: StepEvent) -> None:
        """Compute the scores if they are due; a process that must exit has no time for them."""
        if event.is_due(self._every_steps) and not event.preempted:
            with self._meter.paused():
                event.scores = self._compute(event.state)


class WriteMetrics(Hook):
    """Hook that writes a row of metrics every N steps and shows it in the progress line.

    A row is written after the next step was dispatched, so that the devices never wait for it.

    Args:
        every_steps: the interval; steps with a held-out loss or scores always get a row.
        meter: measures the steps.
        writer: where rows go.
        progress: the progress line.
        more_metrics: further metrics, computed from a row.
    """

    def __init__(
        self,
        every_steps: int,
        meter: StepMeter,
        writer: MetricWriter,
        progress: Progress,
        more_metrics: Callable[[Row], Row],
    ):
        self._every_steps, self._meter, self._writer = every_steps, meter, writer
        self._progress, self._more_metrics = progress, more_metrics
        self._pending: StepEvent | None = None

    def after_step(self, event: StepEvent) -> None:
        """Write the row of the previous step, and remember this one if its row is due."""
        self.write_pending()
        if event.heldout_loss is not None or event.scores or event.is_due(self._every_steps):
            self._pending = event

    def write_pending(self) -> None:
        """Write the remembered row now, if there is one."""
        if self._pending is not None:
            self.write(self._pending)

    def write(self, event: StepEvent) -> None:
        """Wait for a step and write its row now."""
        self._pending = None
        row = self._meter.take(event.step)
        row |= self._more_metrics(row)
        if event.heldout_loss is not None:
            row["heldout_loss"] = event.heldout_loss
        row |= event.scores
        self._writer.write(event.step, row)
        self._progress.show(event.step, progress_text(row))

    def close(self) -> None:
        """End the progress line."""
        self._progress.close()


class SaveCheckpoint(Hook):
    """Hook that saves a checkpoint every N steps, every N minutes, at the last step and before a preemption.

    While steps are skipped, nothing is saved, so that no checkpoint of a collapsed run replaces a good one.

    Args:
        first: the step that the run resumed from, or 0.
        settings: when to save.
        check_time_every: interval in steps of the check whether N minutes have passed.
        save: saves the state of an event.
        metrics: writes the step's row before the save, so that a run resumed from it has the row.
        meter: measures the steps.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        check_time_every: int,
        first: int,
        save: Callable[[StepEvent], None],
        metrics: WriteMetrics,
        meter: StepMeter,
    ):
        self._settings, self._check_time_every = settings, check_time_every
        self._save, self._metrics, self._meter = save, metrics, meter
        self._last_save, self.newest = time.monotonic(), first

    def after_step(self, event: StepEvent) -> None:
        """Save if it is due and no streak of skipped steps is in progress."""
        if not (event.preempted or event.is_due(self._settings.every_steps) or self._is_time(event)):
            return
        self._metrics.write(event)
        # One skipped step is common, and must not keep a run from ending.
        if self._meter.skipped_in_a_row > event.ends_loop:
            return
        with self._meter.paused():
            self._save(event)
        self._last_save, self.newest = time.monotonic(), event.step
        event.has_new_files = True

    def _is_time(self, event: StepEvent) -> bool:
        minutes = self._settings.every_minutes
        if minutes is None or not event.is_due(self._check_time_every):
            return False
        return on_process_0(lambda: time.monotonic() - self._last_save > 60 * minutes)  # clocks differ


class EndCollapsedRun(Hook):
    """Hook that ends a run whose steps are all skipped: a skipped step changes nothing, so it cannot recover.

    It comes after `SaveCheckpoint`, which waits for the last step.

    Args:
        limit: the number of skipped steps in a row that ends the run; two if no step follows.
        checkpoints: where the checkpoints are, for the message.
        saving: knows the newest checkpoint.
        metrics: writes the last row.
        meter: counts skipped steps.
    """

    def __init__(
        self,
        limit: int,
        checkpoints: paths.Path,
        saving: SaveCheckpoint,
        metrics: WriteMetrics,
        meter: StepMeter,
    ):
        self._limit, self._checkpoints, self._saving = limit, checkpoints, saving
        self._metrics, self._meter = metrics, meter

    def after_step(self, event: StepEvent) -> None:
        """Raise if the run has collapsed.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        skipped = self._meter.skipped_in_a_row
        if skipped < min(self._limit, 2 if event.ends_loop else self._limit):
            return
        self._metrics.write_pending()
        newest = self._saving.newest
        path = f"the last good checkpoint is {self._checkpoints / str(newest)}"
        raise UserError(
            f"training collapsed: loss, gradient or update was not finite in the last {skipped} steps;"
            f" {path if newest else 'no checkpoint was saved before'}. Run again with a lower"
            " --config.optimizer.learning_rate"
        )


class DrawSamples(Hook):
    """Hook that draws the grid of samples every N steps, except at the last step (see `train`)."""

    def __init__(self, every_steps: int | None, draw: Callable[[State], None], meter: StepMeter):
        self._every_steps, self._draw, self._meter = every_steps, draw, meter

    def after_step(self, event: StepEvent) -> None:
        """Draw if it is due."""
        if event.is_due(self._every_steps) and event.step != event.last and not event.preempted:
            with self._meter.paused():
                self._draw(event.state)
            event.has_new_files = True


class WriteReport(Hook):
    """Hook that writes report.html after a checkpoint was saved or samples were drawn."""

    def __init__(self, output: Path, meter: StepMeter):
        self._output, self._meter = output, meter

    def after_step(self, event: StepEvent) -> None:
        """Write the report if there is something new to show."""
        if event.has_new_files:
            with self._meter.paused():
                try_to_write_report(self._output)


class Publish(Hook):
    """Hook that copies files to a workdir in object storage: after a save, after samples, and every minute.

    A failure is logged; the next call copies the same files again.
    """

    def __init__(self, publish: Callable[[], None], check_time_every: int, meter: StepMeter):
        self._publish, self._check_time_every, self._meter = publish, check_time_every, meter
        self._last = time.monotonic()

    def after_step(self, event: StepEvent) -> None:
        """Publish if it is due."""
        minute_passed = event.is_due(self._check_time_every) and time.monotonic() - self._last > 60
        if event.has_new_files or minute_passed:
            with self._meter.paused():
                try:
                    self._publish()
                except OSError as error:
                    log.warning("could not copy files to the workdir, will try again: %s", one_line(error))
            self._last = time.monotonic()


def make_hooks(
    run: Run,
    first: int,
    profile: ProfiledSteps | None,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    meter: StepMeter,
    bounds: BestTimes,
) -> list[Hook]:
    """Return the hooks of a run that resumes after step `first`, in the order of their calls."""
    settings, heldout_loss = run.settings, HeldoutLoss(run.components, run.mesh)
    last, figures = settings.training.steps, rankings(settings)

    def utilization(row: Row) -> Row:
        return bounds.utilization(row["images_per_second"]) | peak_memory(run.mesh.local_devices)

    def save(event: StepEvent) -> None:
        run.publish()  # first: a run that resumes from this checkpoint has the rows of its steps
        data = run.data_item(event.examples)
        best = settings.checkpoint.keep_best_by
        metric = event.metric(best, higher_is_better=figures.get(best, False))
        checkpoints.save(event.step, event.state, data, settings, metric=metric)

    def scores(state: State) -> dict[str, float]:
        measured = run.score(state)
        return {name: measured[name] for name in figures} | {"scored_images": measured["num_images"]}

    every = settings.logging.every_steps
    metrics = WriteMetrics(every, meter, writer, Progress("step", first=first, total=last), utilization)
    saving = SaveCheckpoint(settings.checkpoint, every, first, save, metrics, meter)
    directory = run.workdir / "checkpoints"
    return [
        ProfileSteps(Profiler(run.output / "profile", profile, first, last), meter),
        ComputeHeldoutLoss(
            settings.logging.heldout_every_steps,
            lambda state, must_exit: heldout_loss(run.sampled_params(state), must_exit),
            meter,
        ),
        ComputeScores(settings.evaluation.every_steps if figures else None, scores, meter),
        metrics,
        saving,
        EndCollapsedRun(settings.training.max_skipped_steps, directory, saving, metrics, meter),
        DrawSamples(
            settings.sampling.every_steps,
            lambda state: draw_grid(run.sampler(state), run.output, writer),
            meter,
        ),
        WriteReport(run.output, meter),
        Publish(run.publish, every, meter),
    ]


def draw_grid(sampler: Sampler, output: Path, writer: MetricWriter) -> None:
    """Draw samples.png and loss.png and send the grid to TensorBoard and wandb."""
    draw_samples(sampler, output)
    writer.write_image(sampler.step, output / "samples.png")


def try_to_write_report(output: Path) -> None:
    """Write report.html on process 0. A failure is logged and does not end the run."""
    if jax.process_index() == 0:
        try:
            write_report(output)
        except Exception as error:
            log.warning("could not write report.html: %s", one_line(error, name_type=True))


def progress_text(row: Row) -> str:
    """Return the part of a metrics row that the progress line shows."""
    mfu = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    return f"loss {row['loss']:.4f}  {row['images_per_second']:.0f} images/s{mfu}"
