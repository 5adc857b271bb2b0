"""Paths that people type: on a local disk, or in object storage (gs://, s3://).

Every path from a flag, a config field or a Python argument passes through `to_path`. The result supports what
pathlib and etils share: `/`, `name`, `parent`, `exists`, `is_dir`, `iterdir`, `open`, `read_bytes`,
`write_bytes` and `unlink`. An object in object storage appears complete or not at all, there are no
folders, and nothing can be appended to. The functions below hide these differences.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec
import fsspec.config
import fsspec.core
from etils import epath

from dig_jax.errors import ConfigError, install_command, one_line

Path = pathlib.Path | epath.Path
"""A local path or a path in object storage; call `to_path` to make one."""

# The package that reads and writes each kind of object storage.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_STORAGE_PACKAGES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs")
# Orbax and fsspec treat these characters of a path as a pattern, and Orbax rewrites "gs:/" within a path.
_PATTERN = re.compile(r"[*?\[\]\\]|gs:(?=/|$)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def to_path(text: str | os.PathLike) -> Path:
    """Return the path that a person typed. `~` is the home directory.

    Raises:
        ConfigError: an unsupported scheme, an invalid path, or a missing package.
    """
    text = os.fspath(text)
    if "\0" in text:
        raise ConfigError(f"invalid path: got {text!r}; expected no NUL character")
    if scheme := _SCHEME.match(text):
        return _remote_path(text, scheme[1])
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"invalid path {text!r}: {error}; expected ./~… for a name with ~") from error


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is in object storage."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _PACKAGES))


def absolute(path: Path) -> Path:
    """Return the absolute path, without resolving links."""
    return path if is_remote(path) else path.absolute()


def check_plain(path: Path, what: str) -> None:
    """Check that Orbax can write to a folder: it treats some characters of the absolute path as a pattern.

    The path must also be UTF-8.

    Args:
        path: the folder.
        what: the flag or field that the path comes from, for the error.

    Raises:
        ConfigError: the path has such characters.
    """
    check_utf8(path, what)
    text = str(absolute(path))
    if found := _PATTERN.search(text.removeprefix("gs://")):
        raise ConfigError(f"invalid {what}: got {text}; expected an absolute path without {found[0]}")


def check_utf8(path: Path, what: str) -> None:
    """Check that a path is UTF-8, because array_record and TensorStore open no others.

    Args:
        path: a file or folder.
        what: the flag or field that the path comes from, for the error.

    Raises:
        ConfigError: the path is not UTF-8.
    """
    text = str(absolute(path))
    if text != text.encode(errors="replace").decode():
        raise ConfigError(f"invalid {what}: got {text}; expected a name in UTF-8")


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless they exist. Object storage needs no folders."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def children(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted by name; none if the folder does not exist.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        with as_os_error(folder):
            return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders, sorted; none if the folder does not exist."""
    if not is_remote(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    files, prefix = fsspec.core.url_to_fs(str(folder))
    with as_os_error(folder):
        return [folder / name.removeprefix(prefix).lstrip("/") for name in sorted(files.find(prefix))]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    file: Any  # etils declares less than its files can do
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(path: Path) -> int:
    """Return the size of a file in bytes."""
    return path.stat().length if isinstance(path, epath.Path) else path.stat().st_size


def delete(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if isinstance(path, epath.Path):
        with as_os_error(path), contextlib.suppress(FileNotFoundError):
            storage(path).rm(str(path), recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> None:
    """Rename a file or a folder. In object storage a folder's files are copied and deleted one by one."""
    if not is_remote(path):
        path.rename(target)
        return
    with as_os_error(path):
        for file in files_below(path):
            storage(path).copy(str(file), str(target / file.relative_to(path)))
    delete(path)


def create_exclusively(path: Path, content: bytes) -> bool:
    """Create a file unless it exists; return whether it was created. Of several processes one succeeds."""
    try:
        if is_remote(path):
            with _writing(path):
                storage(path).pipe_file(str(path), content, mode="create")
        else:
            with open(path, "xb") as file:
                file.write(content)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[pathlib.Path]:
    """Yield a local file with the content of `path`: the file itself, or a temporary copy.

    For readers that map a file into memory.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, path.name)
        with as_os_error(path):
            storage(path).get_file(str(path), str(copy))
        yield copy


@contextlib.contextmanager
def uploading(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary local file that is uploaded when the block ends without an error."""
    with tempfile.TemporaryDirectory() as folder:
        local = pathlib.Path(folder, path.name)
        with open(local, "wb") as file:
            yield file
        upload(local, path)


def upload(local: pathlib.Path, target: Path) -> None:
    """Copy a local file to object storage."""
    with _writing(target):
        storage(target).put_file(str(local), str(target))


def storage(path: Path) -> fsspec.AbstractFileSystem:
    """Return the file system of a path in object storage."""
    return fsspec.filesystem(str(path).partition(":")[0])


@contextlib.contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Turn the exceptions of gcsfs, s3fs and the network, which share no class, into an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {one_line(error, name_type=True)}") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        with as_os_error(path):
            yield
    except FileNotFoundError as error:  # gcsfs names the request's URL only
        raise FileNotFoundError(errno.ENOENT, "no such bucket", str(path)) from error


def is_storage_error(error: BaseException) -> bool:
    """Return whether gcsfs, s3fs or a package below them raised an exception."""
    return type(error).__module__.partition(".")[0] in _STORAGE_PACKAGES


def _remote_path(text: str, scheme: str) -> epath.Path:
    bucket = re.fullmatch(r"(?:gs|s3)://([^/]+)(/.*)?", text)
    if scheme not in _PACKAGES or bucket is None:
        raise ConfigError(
            f"unsupported path: got {text}; expected a local path, gs://BUCKET/PATH or s3://BUCKET/PATH"
        )
    if importlib.util.find_spec(_PACKAGES[scheme]) is None:
        raise ConfigError(f"{text} needs the package {_PACKAGES[scheme]}: {install_command('storage')}")
    if "#" in text:  # Orbax reads it as the end of the path
        raise ConfigError(f"invalid path: got {text}; expected a path without #")
    path = epath.Path(text)
    check_plain(path, "path")
    _configure()
    return path


def _configure() -> None:
    """Set options of gcsfs, s3fs and etils, unless the user has set them."""
    # Without TensorFlow, and without the gRPC client that gcsfs would use to look for special buckets.
    os.environ.setdefault("EPATH_USE_TF", "false")
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for scheme in _PACKAGES:
        options = fsspec.config.conf.setdefault(scheme, {})
        # A listing in a cache lacks the files of other processes and of TensorStore.
        options.setdefault("use_listings_cache", False)
    # botocore gives up after 3 s by default; with these it waits about as long as gcsfs and TensorStore.
    retries = {"retries": {"mode": "standard", "max_attempts": 12}}
    fsspec.config.conf["s3"].setdefault("config_kwargs", retries)
