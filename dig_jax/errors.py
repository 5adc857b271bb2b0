"""Errors that users see as one line, without a traceback."""

import contextlib
import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence

_MAX_LENGTH = 300


class UserError(Exception):
    """An error that the user can fix. The message names the field, flag or file and the expected value."""


class ConfigError(UserError, ValueError):
    """An invalid configuration value or command-line flag."""


class CheckpointError(UserError):
    """A checkpoint or parameter file that is missing, corrupt, or could not be written."""


class StalledRead(UserError):
    """Data that did not arrive before the process had to exit.

    A thread still waits for it, so the process must exit without waiting for its threads.
    """


class InvalidFile(ValueError):
    """Invalid content of a file. The message is one line and does not name the file."""

    def __str__(self) -> str:
        # The message may quote the file.
        return printable(super().__str__())


def printable(text: str) -> str:
    """Return a text for a terminal: control characters become "?", and line breaks and tabs become spaces.

    Names of files and classes may contain them, and would forge lines or set a terminal's title.
    """
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


class PrintableFormatter(logging.Formatter):
    """A formatter of log messages with names of files and classes, which may contain control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message as one line of printable text."""
        record.message = printable(record.message)
        return super().formatMessage(record)


@contextlib.contextmanager
def naming_environment() -> Iterator[None]:
    """Turn a ValueError of importing JAX, which reads its environment variables, into a ConfigError."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"invalid environment variable: {one_line(error)}") from error


@contextlib.contextmanager
def naming_setting(setting: str) -> Iterator[None]:
    """Re-raise a ValueError or UserError as a ConfigError that starts with the name of a field or flag."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, UserError) as error:
        raise ConfigError(f"{setting}: {error}") from error


@contextlib.contextmanager
def naming_implementation() -> Iterator[None]:
    """Re-raise pallas_gla's error about an implementation that does not run here as a ConfigError."""
    try:
        yield
    except NotImplementedError as error:
        raise ConfigError(f"config.model.implementation: {error}") from error


@contextlib.contextmanager
def naming_directory(directory: os.PathLike) -> Iterator[None]:
    """Re-raise an OSError as a UserError that names the directory that could not be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error


def one_line(error: BaseException, *, name_type: bool = False) -> str:
    """Return the message of an exception as one printable line.

    The message of a `UserError` is not cut. Messages of other exceptions are cut to their first line and
    300 characters; an operating-system error is reduced to the system's message and the file name.

    Args:
        error: any exception. Without a message, the name of its type is returned.
        name_type: put the name of the type in front, for exceptions such as KeyError('x').
    """
    text = str(error).strip()
    if isinstance(error, UserError):
        return " ".join(printable(text).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif system := re.search(r"([^:]+) \[os_error_code=", text):  # TensorStore's, below Orbax
        text = system[1].strip()
    name = type(error).__name__
    if name_type and text:
        text = f"{name}: {text}"
    return printable(text.splitlines()[0][:_MAX_LENGTH]) if text else name


def install_command(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml in a clone; there are no releases."""
    return f"pip install -e '.[{extra}]'"


def alternatives(choices: Sequence[str]) -> str:
    """Return "a, b or c"."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean 'CHOICE'?" for the choice that is most similar to a word, or ""."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
