"""Traces of selected steps by JAX's profiler, in WORKDIR/profile."""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np

from dig_jax.errors import ConfigError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProfiledSteps:
    """The first and the last step to trace."""

    first: int
    last: int


def profiled_steps(numbers: np.ndarray | None) -> ProfiledSteps | None:
    """Return the range of --profile_steps, given as a list such as [100, 101, 102].

    Raises:
        ConfigError: the numbers are not one range that starts at 1 or later.
    """
    if numbers is None:
        return None
    if numbers[0] < 1 or (np.diff(numbers) != 1).any():
        given = ",".join(map(str, numbers.tolist()))
        raise ConfigError(f"invalid --profile_steps={given}; expected one range of steps, such as 100-105")
    return ProfiledSteps(int(numbers[0]), int(numbers[-1]))


class Profiler:
    """Profiler of the requested steps that this start of the run executes.

    Args:
        directory: where to write the trace.
        steps: the steps to trace; None traces nothing.
        done: the number of steps that earlier starts executed. The resume command repeats the flags of the
            first start, so the requested steps may be done already.
        last: the last step of the run.
    """

    def __init__(self, directory: Path, steps: ProfiledSteps | None, done: int, last: int):
        self._directory, self._tracing = directory, False
        self._first, self._last = 1, 0
        if steps is None or jax.process_index():
            return
        self._first, self._last = max(steps.first, done + 1), min(steps.last, last)
        if self._first > self._last:
            log.info(
                "profiling no steps: got --profile_steps=%d-%d, but this start runs steps %d-%d",
                steps.first,
                steps.last,
                done + 1,
                last,
            )

    def starts_at(self, step: int) -> bool:
        """Return whether the trace starts before this step."""
        return step == self._first <= self._last

    def stops_at(self, step: int) -> bool:
        """Return whether the trace ends after this step."""
        return self._tracing and step == self._last

    def start(self) -> None:
        """Start the trace. No step may be running."""
        # Perfetto's format needs no installed viewer.
        jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
        self._tracing = True

    def stop(self) -> None:
        """Write the trace and log how to open it."""
        self._tracing = False
        jax.profiler.stop_trace()
        newest = max(self._directory.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        log.info(
            "profiled steps %d-%d: open %s at https://ui.perfetto.dev, or run pip install xprof and then"
            " xprof --port 8791 --logdir %s",
            self._first,
            self._last,
            newest,
            self._directory,
        )

    def close(self) -> None:
        """End a trace whose last step was not reached."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
