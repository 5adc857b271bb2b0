"""The reader of JSON files that DiG-JAX wrote. Whatever they hold, an error is one line."""

import json
from typing import Any

from dig_jax.errors import InvalidFile
from dig_jax.files.content import check_download
from dig_jax.files.paths import Path, is_remote

# Our files have at most 8 levels, and integers of at most 64 bits.
_MAX_LEVELS = 32
_MAX_DIGITS = 20


def read_json(path: Path, *, max_bytes: int = 2**26) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: reading failed.
        InvalidFile: the file does not hold a JSON object, or one that is too large or nested too deeply.
    """
    if is_remote(path):
        text = path.read_bytes()
    else:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise InvalidFile(f"too large: expected at most {max_bytes:,} bytes")
    return parse_object(text)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Return the object that a JSON text describes.

    Raises:
        InvalidFile: the text does not describe an object, or one that is nested too deeply; of a Git LFS
            pointer or a web page it says what to do.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise InvalidFile(f"invalid JSON: more than {_MAX_LEVELS} levels") from error
    except ValueError as error:  # also of bytes that are not UTF-8
        if isinstance(text, bytes):
            check_download(text)
        raise InvalidFile(f"invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidFile(f"invalid JSON: got a {type(value).__name__}; expected an object")
    _check_levels(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"integer of {len(digits)} digits")
    return int(digits)


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_LEVELS):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    if level:
        raise InvalidFile(f"invalid JSON: more than {_MAX_LEVELS} levels")
