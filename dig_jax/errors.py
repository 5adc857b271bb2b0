"""Errors that are shown to people as one line, without a traceback."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what would be right."""


class ConfigError(UserError, ValueError):
    """A setting that cannot be."""


class CheckpointError(UserError):
    """A checkpoint that is not there, or that cannot be read or written."""


@contextlib.contextmanager
def blaming(setting: str) -> Iterator[None]:
    """Turns a ValueError or UserError into a ConfigError that names the setting at fault."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, UserError) as error:
        raise ConfigError(f"{setting}: {error}") from error


@contextlib.contextmanager
def blaming_disk(directory: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the directory which cannot be written to."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{directory} cannot be written to: {error.strerror or error}") from error


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest of the known words, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
