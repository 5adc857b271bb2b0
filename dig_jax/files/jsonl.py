"""Files of JSON lines: metrics.jsonl and starts.jsonl. A row is a JSON object with an integer "step"."""

import json
import os
from pathlib import Path
from typing import Any

from dig_jax.errors import InvalidFile
from dig_jax.files.atomic import naming_file, replacing
from dig_jax.files.json_file import parse_object

Row = dict[str, Any]


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Return the rows of a file in their order, without invalid lines; none if the file does not exist.

    Raises:
        OSError: reading failed.
    """
    return [row for _, row in _parse(Path(path)) if row is not None]


def append_row(path: str | os.PathLike, row: Row) -> None:
    """Append a row on a new line, even if a killed run left an incomplete line.

    Raises:
        OSError: writing failed; the error names the file.
    """
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with naming_file(Path(path)), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        file.write(line.encode(errors="backslashreplace"))


def truncate_rows(path: str | os.PathLike, *, last_step: int) -> int:
    """Drop rows of steps after `last_step` and invalid lines; keep the other lines byte for byte.

    Returns:
        The number of invalid lines.
    """
    lines = _parse(Path(path))
    with replacing(path) as file:
        file.writelines(line + b"\n" for line, row in lines if row is not None and row["step"] <= last_step)
    return sum(row is None for _, row in lines)


def _parse(path: Path) -> list[tuple[bytes, Row | None]]:
    """Return the lines of a file with their rows; None for an invalid line."""
    content = path.read_bytes() if path.exists() else b""
    # Not splitlines: JSON strings may hold other line separators, such as U+2028.
    return [(line, _row(line)) for line in content.removesuffix(b"\n").split(b"\n") if content]


def _row(line: bytes) -> Row | None:
    try:
        value = parse_object(line)
    except InvalidFile:
        return None
    return value if type(value.get("step")) is int else None
