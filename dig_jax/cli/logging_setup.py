"""Logging of a command: the progress of dig_jax, and warnings of other packages."""

import logging
import sys
import warnings
from typing import Any


def start_logging() -> None:
    """Log progress of dig_jax and warnings of other packages to standard error."""
    # On a terminal a message replaces the progress line, which is then drawn again.
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    logging.basicConfig(format=f"{clear}%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("dig_jax").setLevel(logging.INFO)
    _hide_orbax()
    # We report images above Pillow's limit ourselves.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")


def _hide_orbax() -> None:
    """Hide Orbax's output about failures: its exceptions already become our one-line errors.

    If the disk is full, it logs a traceback, asyncio logs other writes that failed, and TensorStore calls
    back into a closed event loop or leaves coroutines behind. In a regular run it warns of missing metrics.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = hook
