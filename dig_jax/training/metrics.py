"""Where a run's numbers go: metrics.jsonl always, TensorBoard where wanted, and a progress line."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

log = logging.getLogger(__name__)

Record = dict[str, float]


class MetricWriter:
    """Appends records to WORKDIR/metrics.jsonl and, optionally, to TensorBoard event files beside it.

    On resuming, records of steps after the restored one are dropped: they will be written again.
    """

    def __init__(self, workdir: Path, *, first_step: int, tensorboard: bool):
        path = workdir / "metrics.jsonl"
        if path.exists():
            _truncate(path, first_step)
        self._file = path.open("a")
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(workdir / "tensorboard", purge_step=first_step + 1)

    def write(self, step: int, record: Record) -> None:
        """Writes numbers of one step; NaN and infinities become null, as JSON has neither."""
        finite = {name: value for name, value in record.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **dict.fromkeys(record), **finite}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class StepMeter:
    """Collects the metrics of steps that may still be running, and the time that they take."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._metrics: list[dict[str, jax.Array]] = []
        self._start = time.monotonic()
        self._waited = 0.0

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds a step just dispatched, and waits for the one before: at most two are in flight."""
        if self._metrics:
            jax.block_until_ready(self._metrics[-1])
        self._metrics.append(metrics)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Times what the loop waits for its next batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what is no training."""
        start = time.monotonic()
        yield
        self._start += time.monotonic() - start

    def take(self) -> Record:
        """Means over the steps added since the last call, waiting for them, and their speed.

        Returns:
            loss and grad_norm (over the steps that were not skipped; NaN where all were), loss_q1…4 (the
            loss by quarter of the timesteps, where there were any), learning_rate (of the last step),
            skipped_steps (how many of these), images_per_second, data_wait (share of the time).
        """
        taken, self._metrics = jax.device_get(self._metrics), []
        now = time.monotonic()
        elapsed, waited = now - self._start, self._waited
        self._start, self._waited = now, 0.0

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


class Progress:
    """One line with the step, the loss, the speed and the time left.

    On a terminal it is rewritten in place; elsewhere it goes to the log.
    """

    def __init__(self, *, first_step: int, steps: int):
        self._first, self._steps = first_step, steps
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def show(self, step: int, record: Record) -> None:
        """Reports that `step` steps are done."""
        left = (time.monotonic() - self._start) / (step - self._first) * (self._steps - step)
        line = (
            f"step {step}/{self._steps}  loss {record['loss']:.4f}"
            f"  {record['images_per_second']:.0f} images/s  ETA {duration(left)}"
        )
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        else:
            log.info(line)

    def close(self) -> None:
        """Leaves the terminal's line, so that other text can follow."""
        if self._terminal:
            sys.stderr.write("\n")


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _mean(steps: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([metrics[name] for metrics in steps])) if steps else math.nan


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the records of steps up to `last_step`; a killed run may have left half a line."""
    kept, broken = [], 0
    for line in path.read_text(errors="replace").splitlines():
        step = _step_of(line)
        if step is None:
            broken += 1
        elif step <= last_step:
            kept.append(line + "\n")
    if broken:
        log.warning("%s: dropped %d broken lines", path, broken)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None
