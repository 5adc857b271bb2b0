"""Metrics and duration of training steps, collected without waiting for the step that runs."""

import collections
import contextlib
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

log = logging.getLogger(__name__)

Row = dict[str, float]

# A step is slow if it takes _SLOW times the median of the last _RECENT steps (at least _ENOUGH), and at least
# _NOTICEABLE seconds longer: tiny steps on a busy CPU vary more than that.
_SLOW, _RECENT, _ENOUGH, _NOTICEABLE = 3, 50, 10, 0.2


class _Step(NamedTuple):
    """A finished step: its duration, and the time that the loop waited for data, in seconds."""

    number: int
    metrics: Mapping[str, Any]
    seconds: float
    waited: float


class StepMeter:
    """Collector of the metrics and the duration of steps that may still be running.

    A step lasts from the end of the previous step to the end of this one, without pauses. The meter sees a
    step end when the loop waits for it.

    Attributes:
        skipped_in_a_row: the number of skipped steps since the last step that was not skipped, up to the last
            step that the loop waited for.
    """

    def __init__(self, batch_size: int):
        self.skipped_in_a_row = 0
        self._batch_size = batch_size
        self._running: tuple[int, Mapping[str, Any]] | None = None
        self._finished: list[_Step] = []
        self._last_end = time.monotonic()
        self._waited = 0.0
        self._recent: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._has_warned = False

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add a step that was just dispatched and wait for the previous one: at most two are in flight.

        Args:
            step: the step's number.
            metrics: the step's metrics, on the devices.
        """
        self._finish()
        self._running = step, metrics

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the time that the loop waits for the next batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the running step and exclude the duration of the block, which is not training."""
        self._finish()
        start = time.monotonic()
        yield
        self._last_end += time.monotonic() - start

    def take(self, last: int) -> Row:
        """Wait for step `last` and return the metrics of all steps up to it that were not taken before.

        Returns:
            loss, grad_norm: means over the steps that were not skipped; NaN if all were.
            loss_q1 … loss_q4: mean loss by quarter of the timesteps, if the quarter occurred.
            internal_loss, dispersive_loss, …: means of auxiliary losses over the steps that compute them.
            learning_rate: the last step's.
            skipped_steps: the number of skipped steps.
            images_per_second: images of all processes per second of training.
            data_wait: fraction of the time that the loop waited for data.
        """
        if self._running is not None and self._running[0] <= last:
            self._finish()
        taken = [step for step in self._finished if step.number <= last]
        self._finished = self._finished[len(taken) :]
        self._has_warned = False
        seconds, waited = sum(step.seconds for step in taken), sum(step.waited for step in taken)
        return _means(jax.device_get([step.metrics for step in taken])) | {
            "images_per_second": len(taken) * self._batch_size / seconds,
            "data_wait": waited / seconds,
        }

    def _finish(self) -> None:
        """Wait for the running step and record its duration."""
        if self._running is None:
            return
        number, metrics = self._running
        jax.block_until_ready(metrics)
        now = time.monotonic()
        seconds = now - self._last_end
        self._warn_if_slow(number, seconds)
        self._finished.append(_Step(number, metrics, seconds, self._waited))
        self._running, self._last_end, self._waited = None, now, 0.0
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if np.asarray(metrics["skipped"]) else 0

    def _warn_if_slow(self, step: int, seconds: float) -> None:
        """Warn about a slow step, once per row.

        A slow step is slow on all processes. Processes other than 0 warn only if they waited for their data.
        """
        if len(self._recent) >= _ENOUGH and not self._has_warned:
            median = statistics.median(self._recent)
            is_responsible = jax.process_index() == 0 or self._waited > seconds / 2
            if seconds >= _SLOW * median and seconds - median >= _NOTICEABLE and is_responsible:
                self._has_warned = True
                log.warning(
                    "step %d took %.2f s, %.1f × the median of the last %d steps (%.2f s); the loop waited"
                    " %.2f s for data",
                    step,
                    seconds,
                    seconds / median,
                    len(self._recent),
                    median,
                    self._waited,
                )
        self._recent.append(seconds)


def _means(steps: Sequence[Mapping[str, Any]]) -> Row:
    kept = [metrics for metrics in steps if not metrics["skipped"]]
    skipped = len(steps) - len(kept)
    if skipped:
        log.warning(
            "skipped %d of the last %d steps: loss, gradient or update was not finite", skipped, len(steps)
        )
    row = {
        "loss": _mean(kept, "loss"),
        "grad_norm": _mean(kept, "grad_norm"),
        "learning_rate": float(steps[-1]["learning_rate"]),
        "skipped_steps": skipped,
    }
    if kept:
        sums, counts = (np.sum([metrics[name] for metrics in kept], 0) for name in ("loss_sum", "count"))
        for quarter, (total, count) in enumerate(zip(sums, counts, strict=True), 1):
            if count:
                row[f"loss_q{quarter}"] = float(total / count)
        for name in (name for name in kept[0] if name.endswith("_loss")):
            # NaN: the loss has ended.
            if values := [metrics[name] for metrics in kept if np.isfinite(metrics[name])]:
                row[name] = float(np.mean(values))
    return row


def _mean(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([metrics[name] for metrics in steps])) if steps else math.nan
