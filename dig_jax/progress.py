"""How far a long piece of work is: one line, with the time that is left."""

import logging
import math
import sys
import time

log = logging.getLogger(__name__)


class Progress:
    """One line, rewritten in place on a terminal; elsewhere it goes to the log.

    Args:
        what: is counted, such as "step" or "image".
        first: how many were done before.
        total: how many there will be.
        every_seconds: between lines in the log, at least.
    """

    def __init__(self, what: str, *, first: int, total: int, every_seconds: float = 0.0):
        self._what, self._first, self._total, self._every = what, first, total, every_seconds
        self._start, self._last = time.monotonic(), -math.inf
        self._terminal = sys.stderr.isatty()

    def show(self, done: int, details: str = "") -> None:
        """Reports that `done` are done, more than at first; without details, how many per second."""
        now = time.monotonic()
        if not self._terminal and now - self._last < self._every and done < self._total:
            return
        self._last = now
        speed = (done - self._first) / max(now - self._start, 1e-9)
        left = duration((self._total - done) / speed)
        line = f"{self._what} {done}/{self._total}  {details or f'{speed:.3g} per second'}  ETA {left}"
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()
        else:
            log.info(line)

    def close(self) -> None:
        """Leaves the terminal's line, so that other text can follow."""
        if self._terminal and self._last > -math.inf:
            sys.stderr.write("\n")


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
