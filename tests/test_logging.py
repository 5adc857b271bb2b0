import contextlib
import io
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dig_jax.cli.logging_setup import start_logging


@contextlib.contextmanager
def restored_logging():
    """Restore the loggers, and what happens to warnings, at the end."""
    root, hook = logging.getLogger(), sys.unraisablehook
    handlers, level = root.handlers[:], root.level
    filters = {name: logging.getLogger(name).filters[:] for name in ("absl", "asyncio")}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        root.handlers, sys.unraisablehook = handlers, hook
        root.setLevel(level)
        logging.getLogger("dig_jax").setLevel(logging.NOTSET)
        for name, before in filters.items():
            logging.getLogger(name).filters = before


@pytest.fixture
def logged(monkeypatch):
    """A function that returns what was logged to standard error."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with restored_logging():
        start_logging()
        yield stderr.getvalue


@pytest.mark.parametrize("terminal, prefix", [("xterm", "\r\x1b[K"), ("dumb", "")])
def test_a_dumb_terminal_gets_no_escape_codes(monkeypatch, terminal, prefix):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", terminal)
    with restored_logging():
        start_logging()
        logging.getLogger("dig_jax").info("a line")
    assert stderr.getvalue() == f"{prefix}a line\n"


def test_a_name_with_control_characters_cannot_forge_a_line_or_set_a_title(logged):
    logging.getLogger("dig_jax").info("replaced %s", "a\nerror: all is well\n\x1b]0;title\x07\udcff.png")
    assert logged() == "replaced a error: all is well ?]0;title??.png\n"


def test_a_warning_is_one_line_without_code(logged):
    warnings.warn("invalid value\nencountered in cast", RuntimeWarning, stacklevel=1)
    assert logged() == "RuntimeWarning: invalid value\n"


def test_damaged_metadata_of_readable_images_is_not_worth_a_line(logged):
    warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
    assert logged() == ""


def test_nothing_follows_the_error_of_a_failed_save():
    """Orbax, asyncio and TensorStore print more about it, during and after the exception."""
    code = """
import logging
from dig_jax.cli import command_line
from dig_jax.errors import UserError

class Callback:
    def __del__(self):
        raise RuntimeError("Event loop is closed")

def main(settings, workdir):
    async def write(): ...
    write()
    Callback()
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    record = logging.makeLogRecord({"name": "absl", "levelno": 40, "pathname": "/orbax/checkpoint/a.py"})
    logging.getLogger("absl").handle(record)
    raise UserError("the disk is full")

command_line.run(main, "")
"""
    command = [sys.executable, "-c", code, "--config=configs/smoke.py"]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (1, "error: the disk is full\n")
