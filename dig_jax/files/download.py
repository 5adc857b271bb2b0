"""Local copies of files in object storage, for readers of local files that read them again and again."""

import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from dig_jax.errors import InvalidFile, UserError
from dig_jax.files import paths
from dig_jax.files.atomic import replacing
from dig_jax.files.paths import Path

_CONNECTIONS = 16


def local_copies(files: Mapping[Path, str]) -> list[pathlib.Path]:
    """Return local files with the content of `files`: the files themselves, or copies in the user's cache.

    A copy is named by its hash, so all runs and all processes of a machine share it. The cache is
    ~/.cache/dig_jax/files, or below XDG_CACHE_HOME. Nothing is ever deleted from it.

    Args:
        files: the SHA-256 of each file, in hexadecimal.

    Raises:
        InvalidFile: a file has another SHA-256.
        OSError: a file could not be read, or the cache could not be written.
    """
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(_local_copy, files.keys(), files.values()))


def _local_copy(path: Path, sha256: str) -> pathlib.Path:
    if not paths.is_remote(path):
        return pathlib.Path(path)
    copy = _cache() / sha256
    if not copy.exists():
        with paths.local_copy(path) as downloaded:
            if paths.sha256(downloaded) != sha256:
                raise InvalidFile("checksum mismatch")
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as target, downloaded.open("rb") as file:
                while block := file.read(2**22):
                    target.write(block)
    return copy


def _cache() -> pathlib.Path:
    try:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError as error:
        raise UserError("no home directory for a cache of files; set XDG_CACHE_HOME") from error
    return cache / "dig_jax" / "files"
