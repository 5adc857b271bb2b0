"""One writer at a time: a lock file that says who writes, where and since when.

A writer on this machine is alive if its process runs. A writer on another machine is alive if it renews the
lock file, which it does every `_BEAT` seconds. Nobody compares clocks: a new writer watches the file.
"""

import contextlib
import dataclasses
import datetime
import getpass
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from dig_jax.errors import InvalidFile, UserError
from dig_jax.files.json_file import parse_object
from dig_jax.files.paths import Path, as_os_error, create_exclusively, is_remote, make_folder, storage
from dig_jax.files.processes import is_running, machine, start_time

log = logging.getLogger(__name__)

# The name of the lock file in a directory that has one writer.
LOCK_FILE = ".lock"

_BEAT = 10.0
# A lock that is not renewed for this many seconds belongs to a dead writer.
_DEAD = 60.0
_POLL = 1.0
# Seconds after which a new owner checks that nobody else replaced the same stale lock: not all file systems
# can exclude it.
_SETTLE = 0.2


@dataclasses.dataclass(frozen=True)
class _Owner:
    """The content of a lock file."""

    pid: int
    host: str
    user: str
    since: str
    machine: str
    started: str | None
    token: str

    @classmethod
    def this_process(cls) -> "_Owner":
        pid, now = os.getpid(), datetime.datetime.now(datetime.UTC)
        since = f"{now:%Y-%m-%d %H:%M:%S} UTC"
        token = secrets.token_hex(8)
        return cls(pid, socket.gethostname(), _user(), since, machine(), start_time(pid), token)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (user {self.user}) since {self.since}"

    def runs_here(self) -> bool | None:
        """Return whether the owner runs on this machine; None if that cannot be told."""
        is_known = self.machine == machine() and os.name == "posix"
        return is_running(self.pid, self.started) if is_known else None


@contextlib.contextmanager
def writer_lock(path: Path, what: str | os.PathLike) -> Iterator[None]:
    """Hold a lock file, and create its folder. The lock of a dead writer is replaced.

    If another writer replaces the lock, because this process was suspended for longer than `_DEAD` seconds,
    the process exits at once, as if it had been killed.

    Args:
        path: the lock file.
        what: what the lock protects, for messages.

    Raises:
        UserError: another writer holds the lock; the message names it.
        OSError: the lock file could not be written.
    """
    owner = _Owner.this_process()
    try:
        make_folder(path.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"invalid directory {path.parent}: it is a file or in a file") from error
    _acquire(path, owner, what)
    ended = threading.Event()
    beating = threading.Thread(target=_keep, args=(path, owner, what, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError):
            if _owner(_read(path)) == owner:
                path.unlink()


def _acquire(path: Path, owner: _Owner, what: str | os.PathLike) -> None:
    while not _create(path, owner):
        found = _read(path)
        if found is None:
            if not is_remote(path) and os.path.islink(path):  # it exists, but nothing can be read
                raise UserError(f"{path} is a symbolic link to a missing file; expected no link: delete it")
            continue
        other = _owner(found)
        runs = other.runs_here() if other else None
        if runs or (runs is None and _is_renewed(path, what)):
            raise UserError(f"{what} is in use by {_owner(_read(path)) or other or 'another process'}")
        if _replace(path, found, owner, what):
            return


def _replace(path: Path, stale: tuple[bytes, int], owner: _Owner, what: str | os.PathLike) -> bool:
    """Replace the lock of a dead writer; return False if the lock changed or disappeared meanwhile."""
    with _only_replacement(path.parent):
        if _read(path) != stale:
            return False
        log.info("replacing the lock of %s on %s", _owner(stale) or "an unknown process", what)
        path.unlink(missing_ok=True)
        if not _create(path, owner):
            return False
    time.sleep(_SETTLE)
    return _owner(_read(path)) == owner


@contextlib.contextmanager
def _only_replacement(directory: Path) -> Iterator[None]:
    """Exclude other processes that replace a lock in this directory, where the file system can."""
    if is_remote(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not available on Windows

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_renewed(path: Path, what: str | os.PathLike) -> bool:
    """Watch the lock of a writer that cannot be asked; return whether the writer lives."""
    first, deadline = _read(path), time.monotonic() + _DEAD
    log.info(
        "%s was locked by %s; waiting up to %g seconds for a sign of it",
        what,
        _owner(first) or "an unknown process",
        _DEAD,
    )
    while time.monotonic() < deadline:
        time.sleep(_POLL)
        now = _read(path)
        if now != first:
            return now is not None
    return False


def _keep(path: Path, owner: _Owner, what: str | os.PathLike, ended: threading.Event) -> None:
    """Renew the lock until the writer ends."""
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):  # the file system may be away for a while
            other = _owner(_read(path))
            if other is None:
                _create(path, owner)  # somebody deleted it
            elif other == owner:
                _renew(path, owner)
            else:
                sys.stderr.write(f"error: {what} was taken over by {other}, as this process was suspended\n")
                sys.stderr.flush()
                os._exit(1)


def _create(path: Path, owner: _Owner) -> bool:
    """Create the lock file; return False if it exists."""
    return create_exclusively(path, _content(owner))


def _renew(path: Path, owner: _Owner) -> None:
    """Change what `_read` returns."""
    if is_remote(path):
        with as_os_error(path):
            path.write_bytes(_content(owner) + b" " * (time.monotonic_ns() % 100))
    else:
        os.utime(path)


def _read(path: Path) -> tuple[bytes, int] | None:
    """Return the content of the lock file and the time of its last change; None if there is none."""
    try:
        if is_remote(path):
            with as_os_error(path):
                # In one request, because the owner may rewrite it.
                content: Any = storage(path).cat_file(str(path))
                return content, 0
        with open(path, "rb") as file:  # opening it also updates what a network file system caches
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _content(owner: _Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode()


def _owner(found: tuple[bytes, int] | None) -> _Owner | None:
    if found is None:
        return None
    try:
        owner = _Owner(**parse_object(found[0]))
    except (InvalidFile, TypeError):
        return None
    return owner if type(owner.pid) is int and owner.pid > 0 else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        return str(os.getuid())
