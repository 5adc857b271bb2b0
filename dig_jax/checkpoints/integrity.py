"""Checks that the files of a checkpoint are as they were written.

Orbax detects a missing file, but reads a changed byte as a different number. So a record of all files is
written with them: their SHA-256, in the format of `sha256sum --check`, or their sizes only, in object storage
and with checkpoint.checksums=False. Files that appear later, such as .DS_Store, do not matter.
"""

import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor

from dig_jax.errors import CheckpointError, one_line
from dig_jax.files.paths import Path, as_os_error, files_below, is_remote, sha256, size

log = logging.getLogger(__name__)

_ITEMS = ("config", "data", "state")


def write_record(directory: Path, *, checksums: bool) -> None:
    """Record the files of a checkpoint in its directory.

    Args:
        directory: the checkpoint, complete but for the record.
        checksums: record the SHA-256 of each file on a disk, not only its size. Object storage verifies
            what it receives and stores, and would have to send every byte back.
    """
    name = "SHA256SUMS" if checksums and not is_remote(directory) else "SIZES"
    values = _measure(directory, [path for path in _files(directory) if not _is_hidden(path)], name)
    lines = [_heading(len(values)), *(f"{value}  {path}" for path, value in values.items())]
    (directory / name).write_text("\n".join(lines) + "\n")


def _heading(count: int) -> str:
    """Return the first line of a record, which shows whether the record was cut off at the end of a line."""
    return f"# {count} files"


def has_record(directory: Path) -> bool:
    """Return whether this process sees the record of a checkpoint."""
    return any((directory / name).exists() for name in _MEASURES)


def find_corruption(directory: Path, *, index: int = 0, count: int = 1) -> str | None:
    """Return how a checkpoint's files differ from the record, or None if they do not.

    Args:
        directory: the checkpoint.
        index: the number of this process, which checks its share of the files.
        count: the number of processes that call this.

    Raises:
        CheckpointError: a file cannot be read, which does not tell whether it is corrupt.
    """
    try:
        name = next((name for name in _MEASURES if (directory / name).exists()), None)
        if name is None:
            return f"neither {' nor '.join(_MEASURES)} exists"
        lines = (directory / name).read_bytes().decode(errors="replace").splitlines()
        # Older records have no heading.
        if lines and lines[0].startswith("#") and lines.pop(0) != _heading(len(lines)):
            return f"incomplete record: {name}"
        expected = {path: value for value, _, path in (line.partition("  ") for line in lines)}
        if index == 0:
            _warn_of_strays(directory, expected)
        found = _measure(directory, sorted(expected)[index::count], name)
    except FileNotFoundError as error:
        return f"missing file: {error.filename}"
    except (NotADirectoryError, IsADirectoryError) as error:
        return one_line(error)
    except OSError as error:
        if error.errno == errno.EIO:
            return one_line(error)
        raise CheckpointError(f"cannot read checkpoint {directory}: {one_line(error)}") from error
    changed = next((path for path, value in found.items() if expected[path] != value), None)
    return changed and f"changed file: {changed}"


def _files(directory: Path) -> list[str]:
    """Return the files of a checkpoint's items, relative to its directory."""
    paths = (path for item in _ITEMS for path in files_below(directory / item))
    return [path.relative_to(directory).as_posix() for path in paths]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _warn_of_strays(directory: Path, expected: dict[str, str]) -> None:
    strays = [path for path in _files(directory) if path not in expected and not _is_hidden(path)]
    if strays:
        log.warning("ignoring %d files in %s that came later, such as %s", len(strays), directory, strays[0])


def _measure(directory: Path, paths: list[str], record: str) -> dict[str, str]:
    """Return the value of each file for a record, computed in parallel."""
    measure = _MEASURES[record]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        values = pool.map(lambda path: measure(directory / path), paths)
        return dict(zip(paths, values, strict=True))


def _size(path: Path) -> str:
    with as_os_error(path):
        return str(size(path))


_MEASURES = {"SHA256SUMS": sha256, "SIZES": _size}
