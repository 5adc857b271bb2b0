"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb where wanted."""

import collections
import contextlib
import logging
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from dig_jax.files.jsonl import append_row, truncate_rows
from dig_jax.training.telemetry.wandb import WandbRun

log = logging.getLogger(__name__)

Record = dict[str, float]

# A step is slow at so many times the median of the most recent ones, of which there must be enough, if it
# takes noticeably longer, in seconds: the tiny steps of a small model on a busy CPU are not worth a line.
_SLOW, _RECENT, _ENOUGH, _NOTICEABLE = 3, 50, 10, 0.2


class MetricWriter:
    """Appends records to WORKDIR/metrics.jsonl and, where wanted, to TensorBoard files and to wandb.

    On resuming, records of steps after the restored one are dropped: they will be written again.

    Args:
        workdir: where it all goes; in processes but the first one, a directory that is thrown away.
        first_step: that is restored, or 0.
        tensorboard: whether files for it are written.
        wandb: a run of it, which is closed with this writer.
    """

    def __init__(self, workdir: Path, *, first_step: int, tensorboard: bool, wandb: WandbRun | None = None):
        self._path = workdir / "metrics.jsonl"
        if invalid := truncate_rows(self._path, last_step=first_step):
            log.warning("%s: dropped %d broken lines", self._path, invalid)
        self._tensorboard, self._wandb = None, wandb
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(workdir / "tensorboard", purge_step=first_step + 1)

    def write(self, step: int, record: Record) -> None:
        """Writes numbers of one step; NaN and infinities become null, as JSON has neither."""
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        append_row(self._path, {"step": step, **dict.fromkeys(record), **finite})
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, finite)

    def picture(self, step: int, path: Path) -> None:
        """Shows a grid of samples, if there is one, where pictures can be shown."""
        if not path.exists():
            return
        if self._tensorboard is not None:
            self._tensorboard.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.picture(step, path)

    def close(self) -> None:
        """Writes what is buffered."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()


class StepMeter:
    """Collects the metrics of steps that may still be running, and the time that they take.

    A step's time is that between the ends of the step before and of its own, as the loop sees them while it
    waits for the one that runs; what is no training is left out. So a record's time is that of its steps,
    although it is read when later ones are under way.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._metrics: list[dict[str, Any]] = []
        self._running: int | None = None
        self._ended = self._began = time.monotonic()
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._waited = self._waited_before = 0.0
        self._told = False

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds a step just dispatched, and waits for the one before: at most two are in flight.

        Args:
            step: its number.
            metrics: arrays on the devices, as `train_step` gives them.
        """
        self._finish()
        self._metrics.append(metrics)
        self._running = step

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Times what the loop waits for its next batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the step that runs, and leaves out the time of what then is no training."""
        self._finish()
        start = time.monotonic()
        yield
        pause = time.monotonic() - start
        self._began += pause
        self._ended += pause

    def take(self) -> Record:
        """Means over the steps added since the last call, waiting for them, and their speed.

        Returns:
            loss and grad_norm (over the steps that were not skipped; NaN where all were), loss_q1…4 (the
            loss by quarter of the timesteps, where there were any), learning_rate (of the last step),
            skipped_steps (how many of these), images_per_second, data_wait (share of the time).
        """
        self._finish()
        taken, self._metrics = jax.device_get(self._metrics), []
        elapsed, waited = self._ended - self._began, self._waited_before
        self._began, self._waited_before, self._told = self._ended, 0.0, False

        kept = [metrics for metrics in taken if not metrics["skipped"]]
        skipped = len(taken) - len(kept)
        if skipped:
            log.warning("%d of the last %d steps were not finite and were skipped", skipped, len(taken))
        record = {
            "loss": _mean(kept, "loss"),
            "grad_norm": _mean(kept, "grad_norm"),
            "learning_rate": taken[-1]["learning_rate"],
            "skipped_steps": skipped,
            "images_per_second": len(taken) * self._batch_size / elapsed,
            "data_wait": waited / elapsed,
        }
        totals, counts = (sum(metrics[name] for metrics in kept) for name in ("loss_sum", "count"))
        for quarter in range(4 if kept else 0):
            if counts[quarter]:
                record[f"loss_q{quarter + 1}"] = totals[quarter] / counts[quarter]
        return {name: value if isinstance(value, int) else float(value) for name, value in record.items()}

    def _finish(self) -> None:
        """Waits for the step that runs, and notes its time."""
        if self._running is None:
            return
        jax.block_until_ready(self._metrics[-1])
        now = time.monotonic()
        self._note_slow(self._running, now - self._ended, self._waited)
        self._running, self._ended = None, now
        self._waited_before += self._waited
        self._waited = 0.0

    def _note_slow(self, step: int, seconds: float, waited: float) -> None:
        """Warns of a slow step, once per record.

        A slow step is slow in all processes: but the first they tell only that they waited for their data.
        """
        if len(self._recent) >= _ENOUGH and not self._told:
            usual = statistics.median(self._recent)
            is_mine = jax.process_index() == 0 or waited > seconds / 2
            if seconds >= _SLOW * usual and seconds - usual >= _NOTICEABLE and is_mine:
                self._told = True
                log.warning(
                    "step %d took %.2f s, %.1f × the median of the %d before (%.2f s); %.2f s of it were"
                    " waiting for data",
                    step,
                    seconds,
                    seconds / usual,
                    len(self._recent),
                    usual,
                    waited,
                )
        self._recent.append(seconds)


def details(record: Record) -> str:
    """What of a record stands in the progress line."""
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return f"loss {record['loss']:.4f}  {record['images_per_second']:.0f} images/s{mfu}"


def _mean(steps: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([metrics[name] for metrics in steps])) if steps else math.nan
