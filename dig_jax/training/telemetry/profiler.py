"""A trace of some steps, by JAX's profiler, in WORKDIR/profile."""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np

from dig_jax.errors import ConfigError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProfiledSteps:
    """The steps to be traced, both ends included."""

    first: int
    last: int


def profiled_steps(numbers: np.ndarray | None) -> ProfiledSteps | None:
    """The steps of a list such as 100, 101, 102; None of none.

    Raises:
        ConfigError: the numbers have gaps, or there is no such step.
    """
    if numbers is None:
        return None
    if numbers[0] < 1 or (np.diff(numbers) != 1).any():
        raise ConfigError("--profile_steps must be one range of steps, counted from 1, such as 100-105")
    return ProfiledSteps(int(numbers[0]), int(numbers[-1]))


class Profiler:
    """Starts and stops the trace of those `steps` that this start of a run takes.

    Args:
        directory: to be written to.
        steps: to be traced; None for none.
        done: steps taken by earlier starts. The command that goes on with a run is that which began it.
        last: step of the run.
    """

    def __init__(self, directory: Path, steps: ProfiledSteps | None, done: int, last: int):
        self._directory, self._tracing = directory, False
        self._first = self._last = 0
        if steps is None or jax.process_index():
            return
        self._first, self._last = max(steps.first, done + 1), min(steps.last, last)
        if self._first > self._last:
            log.info("nothing is profiled: of steps %d-%d none is left", steps.first, steps.last)

    def starts(self, step: int) -> bool:
        """Whether `start` is to be called before this step."""
        return step == self._first <= self._last

    def stops(self, step: int) -> bool:
        """Whether `stop` is to be called after this step."""
        return self._tracing and step == self._last

    def start(self) -> None:
        """Begins the trace; no step should be under way."""
        # The second form of the trace is the one that needs no program to be installed.
        jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
        self._tracing = True

    def stop(self) -> None:
        """Writes the trace, and says how to look at it."""
        self._tracing = False
        jax.profiler.stop_trace()
        newest = max(self._directory.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        log.info(
            "steps %d-%d are profiled: open %s at https://ui.perfetto.dev, or pip install xprof and"
            " xprof --port 8791 --logdir %s",
            self._first,
            self._last,
            newest,
            self._directory,
        )

    def close(self) -> None:
        """Ends a trace whose last step did not come."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
