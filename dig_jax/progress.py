"""Progress of long work, with the remaining time."""

import io
import logging
import math
import os
import shutil
import sys

from tqdm import tqdm

log = logging.getLogger(__name__)

_WITH_RATE = "{desc} {n_fmt}/{total_fmt} {rate_fmt}, ETA {remaining}"
_WITH_DETAILS = "{desc} {n_fmt}/{total_fmt}{postfix}, ETA {remaining}"


def is_terminal() -> bool:
    """Return whether standard error is a terminal that understands escape sequences."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """Progress as one line that is rewritten in place on a terminal, or as lines in the log elsewhere.

    Use it as a context manager: until a line is closed, the next one appears below it.

    Args:
        what: name of a counted item, such as "step" or "image".
        first: number already done at the start.
        total: number that will be done at the end.
        every_seconds: minimum time between lines in the log.
    """

    def __init__(self, what: str, *, first: int, total: int, every_seconds: float = 0.0):
        terminal = is_terminal()
        self._bar = _Bar(
            desc=what,
            unit=what,
            initial=first,
            total=total,
            file=sys.stderr if terminal else _LogFile(),
            leave=terminal,
            # tqdm shows nothing on a terminal that reports no size.
            ncols=shutil.get_terminal_size().columns if terminal else None,
            nrows=24,
            mininterval=0 if terminal else every_seconds,
            miniters=0,
            smoothing=0,  # the rate since the start
            delay=1e-9,  # no line before the first `show`
        )
        self._bar.last_print_t = -math.inf  # the first `show` always prints

    def show(self, done: int, details: str = "") -> None:
        """Show the number done, with details or the rate."""
        self._bar.bar_format = _WITH_DETAILS if details else _WITH_RATE
        self._bar.set_postfix_str(details, refresh=False)
        if not self._bar.update(done - self._bar.n) and done >= self._bar.total:
            self._bar.refresh()

    def close(self) -> None:
        """End the terminal's line, so that other text can follow."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Bar(tqdm):
    monitor_interval = 0  # no thread that redraws


class _LogFile(io.StringIO):
    """A text file that logs each write, without the carriage returns and spaces that clear a line."""

    def write(self, text: str, /) -> int:
        if text.strip():
            log.info(text.strip())
        return len(text)


def duration(seconds: float) -> str:
    """Return seconds as "1:02:03" or "2:03"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
