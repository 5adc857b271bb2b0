"""Files and folders that appear complete or not at all."""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dig_jax.files.paths import files_below, is_remote, to_path, upload, uploading
from dig_jax.files.processes import is_running

# Seconds without a change after which a temporary file of another machine counts as left over.
_ABANDONED = 3600
_TEMPORARY = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends; an error deletes it instead.

    Raises:
        OSError: the file could not be written; the error names `path`.
    """
    if is_remote(path):
        with uploading(to_path(path)) as file:
            yield file
        return
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with naming_file(path, temporary):
            # "x" refuses a name that exists, also a symbolic link that somebody else made.
            with open(temporary, "xb") as file:
                yield file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Create a temporary folder that becomes the new folder `path` when the block ends.

    An error deletes it instead. In object storage, files appear one after the other.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            for file in files_below(Path(folder)):
                upload(Path(file), to_path(path) / file.relative_to(folder).as_posix())
        return
    path = Path(path)
    temporary = temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming_file(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let an OSError of the block name `path` if it names no file, or the temporary file."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        if error.errno is None:  # NumPy's
            raise OSError(f"cannot write {path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as file:
        # A file name that is not UTF-8 has lone surrogates, which become JSON's escapes.
        file.write(text.encode(errors="backslashreplace"))


def remove_leftovers(directory: str | os.PathLike) -> None:
    """Delete the temporary files and folders of killed writers from a directory; object storage has none.

    Call it only while no other writer of this process uses the directory.
    """
    if is_remote(directory):
        return
    with contextlib.suppress(OSError):
        for path in list(Path(directory).iterdir()):
            if _is_leftover(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return an unused hidden name beside `path`, which tells `remove_leftovers` what process writes it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _is_leftover(path: Path) -> bool:
    found = _TEMPORARY.fullmatch(path.name)
    if not found:
        return False
    number = int(found[1])
    if f".{socket.gethostname()}.{number}." in path.name and (
        number == os.getpid() or not is_running(number)
    ):
        return True
    return time.time() - path.lstat().st_mtime > _ABANDONED
