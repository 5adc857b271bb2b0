"""Logging of a command: the progress of dig_jax, and warnings of other packages."""

import logging
import sys
import warnings
from typing import Any

from dig_jax.errors import PrintableFormatter, one_line
from dig_jax.progress import is_terminal


def start_logging() -> None:
    """Log progress of dig_jax and warnings of other packages to standard error."""
    # On a terminal a message replaces the progress line, which is then drawn again.
    clear = "\r\x1b[K" if is_terminal() else ""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(f"{clear}%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    # pallas_gla logs which implementation runs, and why not another.
    for name in ("dig_jax", "pallas_gla"):
        logging.getLogger(name).setLevel(logging.INFO)
    _hide_orbax()
    warnings.showwarning = _log_warning
    # Pillow warns of damaged metadata of images that it can read.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # We report images above Pillow's limit ourselves.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")


def _log_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Log a warning as one line, without the line of code that raised it."""
    text = one_line(message) if isinstance(message, Warning) else message
    logging.getLogger("py.warnings").warning("%s: %s", category.__name__, text)


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
