"""Multi-process runs: start-up, agreement between processes, and failure of one of them."""

import contextlib
import errno
import io
import json
import logging
import os
import pathlib
import re
import socket
import sys
import tempfile
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src.clusters import SlurmCluster
from jax.experimental import multihost_utils

from dig_jax.errors import ConfigError, UserError, naming_directory
from dig_jax.files.local_folder import LocalFolder, local_folder
from dig_jax.files.lock import writer_lock
from dig_jax.files.paths import Path

# Checksums that every process contributes in `check_agreement`: the size must not depend on the settings.
_SLOTS = 256
# Bytes of a process that `gather_arrays` sends at once: every device holds those of all processes.
_PART = 2**28

_EXIT_SECONDS = 10
_BARRIER_SECONDS = 7 * 24 * 3600
_connected = threading.Event()
# What JAX says if it has computed before, as when a notebook runs the program a second time.
_TOO_LATE = "must be called before"

# JAX has no error class for a failed peer, and the status codes of collectives say UNKNOWN or INTERNAL.
_PEER_FAILURE = re.compile(
    "gloo|nccl|coordination service|barrier|heartbeat|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
_STATUS = re.compile("[A-Z_]+: ")

T = TypeVar("T")


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> None:
    """Connect to the other processes of this run, if there are any.

    Call it before anything else uses JAX. Missing arguments come from the environment (TPU pods, SLURM,
    Open MPI). If the environment has none, the process runs alone. All processes except process 0 log
    warnings only.

    Args:
        coordinator: ADDRESS:PORT of process 0.
        num_processes: number of processes.
        process_id: index of this process, from 0.
        timeout: seconds to wait for the other processes.

    Raises:
        ConfigError: invalid or incomplete arguments.
        UserError: the processes did not connect, or the coordinator's port is in use.
    """
    _check_flags(coordinator, num_processes, process_id, timeout)
    if process_id == 0 and coordinator is not None:
        _check_port_is_free(int(coordinator.rpartition(":")[2]), "--coordinator")
    elif (port := _port_under_slurm()) and {coordinator, process_id} == {None}:
        _check_port_is_free(port, "the environment variable JAX_COORDINATOR_PORT")
    given = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(**given, initialization_timeout=10**6)
        except Exception as error:
            failures.append(error)

    # JAX's timeout aborts the process with a stack dump, and Ctrl-C does not interrupt its wait.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "named by the environment")
        raise UserError(
            f"the processes did not connect within {timeout:g} seconds (coordinator: {address}); expected all"
            " processes to be running and the coordinator to be reachable from all hosts"
        )
    if not failures:
        _connected.set()
        if jax.process_index():
            for name in ("dig_jax", "pallas_gla"):
                logging.getLogger(name).setLevel(logging.WARNING)
    elif any(value is not None for value in given.values()):
        raise ConfigError(f"--coordinator, --num_processes and --process_id: {failures[0]}") from failures[0]
    # ValueError: the environment names no processes.
    elif not (isinstance(failures[0], ValueError) or _TOO_LATE in str(failures[0])):
        raise UserError(f"cannot connect to the other processes: {failures[0]}") from failures[0]


def _check_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> None:
    address, _, port = (coordinator or "localhost:1").rpartition(":")
    if not (address and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ConfigError(f"invalid --coordinator={coordinator}; expected ADDRESS:PORT")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ConfigError(f"invalid --join_timeout={timeout}; expected a positive number of seconds")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ConfigError(
            f"invalid --process_id={process_id}; expected 0 to {num_processes - 1}"
            f" with --num_processes={num_processes}"
        )


def _port_under_slurm() -> int | None:
    """Return the coordinator's port that JAX will choose, on process 0 of a SLURM job."""
    if not SlurmCluster.is_env_present() or SlurmCluster.get_process_id():
        return None
    address = SlurmCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
    return int(address.rpartition(":")[2])


def _check_port_is_free(port: int, setting: str) -> None:
    """Raise a UserError if the port is in use, for example by a job that still ends: JAX would crash.

    Args:
        port: the port of the coordinator.
        setting: the flag or environment variable that sets it.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as listener:
        # A connection that was closed a moment ago does not occupy the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # JAX reports it
            raise UserError(
                f"port {port} of this host is in use; choose another port in {setting}"
            ) from error


def check_agreement(settings: Mapping[str, object]) -> None:
    """Raise on all processes unless every process has the same settings.

    Args:
        settings: values by name; their `repr` is compared.

    Raises:
        ConfigError: the settings differ; the message names them.
    """
    if jax.process_count() == 1:
        return
    texts = [f"{name}={value!r}" for name, value in sorted(settings.items())]
    sums = np.zeros(_SLOTS, np.uint32)
    sums[: len(texts)] = [zlib.crc32(text.encode()) for text in texts[:_SLOTS]]
    differs = (multihost_utils.process_allgather(sums) != sums).any(axis=0)
    differs_anywhere = multihost_utils.process_allgather(differs).any(axis=0)
    if differs_anywhere.any():
        here = [text for text, differs in zip(texts, differs_anywhere, strict=False) if differs]
        raise ConfigError(
            f"processes have different settings: process {jax.process_index()} has"
            f" {', '.join(here[:5]) or 'fewer settings'}; expected the same command on all processes"
        )


def on_process_0(compute: Callable[[], T]) -> T:
    """Call `compute` on process 0, however long it takes, and return its result on all processes.

    The result is a JSON value.

    Raises:
        UserError: `compute` raised it on process 0; all processes raise it.
    """
    if jax.process_count() == 1:
        return compute()
    outcome, failure = {}, None
    if jax.process_index() == 0:
        try:
            outcome["value"] = compute()
        except UserError as error:
            failure, outcome["error"] = error, [str(error), isinstance(error, ConfigError)]
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    barrier("process 0 has computed")  # a collective would time out
    size = multihost_utils.broadcast_one_to_all(np.int32(text.size))
    outcome = json.loads(multihost_utils.broadcast_one_to_all(np.resize(text, int(size))).tobytes())
    if "error" in outcome:
        message, is_config_error = outcome["error"]
        raise failure or (ConfigError if is_config_error else UserError)(message)
    return outcome["value"]


def processes_without(present: bool) -> list[int]:
    """Return the indices of the processes that pass False."""
    if jax.process_count() == 1:
        return [] if present else [0]
    return np.flatnonzero(~multihost_utils.process_allgather(np.bool_(present))).tolist()


def gather_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the arrays of all processes, in order of processes; shapes and values may differ."""
    if jax.process_count() == 1:
        return [dict(arrays)]
    buffer = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez(buffer, **named)
    content = np.frombuffer(buffer.getvalue(), np.uint8)  # JAX would make float32 of float64
    sizes = _gathered_sizes(content.size)
    parts = []
    for start in range(0, max(sizes), _PART):
        length = min(_PART, max(sizes) - start)
        parts.append(multihost_utils.process_allgather(np.resize(content[start : start + length], length)))
    result = []
    for number, size in enumerate(sizes):
        with np.load(io.BytesIO(np.concatenate([part[number] for part in parts])[:size].tobytes())) as loaded:
            result.append({name: loaded[name] for name in loaded.files})
    return result


def _gathered_sizes(size: int) -> list[int]:
    """Return the numbers of bytes of all processes."""
    # As bytes, because JAX would make int32 of int64.
    digits = multihost_utils.process_allgather(np.array([size], np.int64).view(np.uint8))
    return np.ascontiguousarray(digits).view(np.int64)[:, 0].tolist()


def barrier(name: str) -> None:
    """Wait, for up to a week, until all processes reach the barrier of this name."""
    if jax.process_count() > 1:
        # Not `sync_global_devices`: collectives time out after minutes, and a process may work for hours.
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _BARRIER_SECONDS)


def own_share(start: int, stop: int) -> range:
    """Return the part of start … stop - 1 that is this process's to work on; parts differ by at most 1."""
    index, count = jax.process_index(), jax.process_count()
    return range(start + (stop - start) * index // count, start + (stop - start) * (index + 1) // count)


@contextlib.contextmanager
def output_folder(workdir: Path) -> Iterator[LocalFolder]:
    """Yield the workdir or its local folder on process 0, and a temporary folder on other processes."""
    if jax.process_index() == 0:
        with local_folder(workdir) as local:
            yield local
        return
    with tempfile.TemporaryDirectory() as folder:
        yield LocalFolder(pathlib.Path(folder), pathlib.Path(folder))


@contextlib.contextmanager
def one_writer(lock: Path, what: str | os.PathLike) -> Iterator[None]:
    """Hold a lock file on process 0, for all processes of this run; see `dig_jax.files.lock`.

    Args:
        lock: the lock file.
        what: what the lock protects, for messages.

    Raises:
        UserError: another run holds the lock, or the lock file could not be written.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            with naming_directory(lock.parent):
                held.enter_context(writer_lock(lock, what))

        on_process_0(take)
        yield


def check_shared_directory(directory: Path) -> None:
    """Raise on all processes unless every process sees the directory of process 0.

    Raises:
        UserError: a process does not see it; the message names the process.
    """
    if jax.process_count() == 1:
        return
    # A new name each time: network file systems cache that a file is missing.
    seen = directory / on_process_0(lambda: f".seen-{uuid.uuid4().hex}")
    try:
        on_process_0(lambda: seen.write_bytes(b""))
        lacking = processes_without(seen.exists())
    finally:
        if jax.process_index() == 0:
            seen.unlink(missing_ok=True)
    if lacking:
        raise UserError(
            f"process {', '.join(map(str, lacking))} does not see the files that process 0 writes to"
            f" {directory}; expected a directory on a file system that all hosts share"
        )


def is_peer_failure(error: BaseException | None) -> bool:
    """Return whether an exception, or one of its causes, means that another process failed."""
    if error is None or not jax.distributed.is_initialized():
        return False
    # On the CPU a collective that fails while it is dispatched raises ValueError with a status.
    by_jax = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and _STATUS.match(str(error))
    )
    return bool(by_jax and _PEER_FAILURE.search(str(error))) or is_peer_failure(error.__cause__)


def exit_process(status: int, *, wait: bool = True) -> NoReturn:
    """Exit after a failure, without waiting minutes for processes that did not fail.

    Args:
        status: the exit status.
        wait: whether to give the other processes ten seconds to fail in the same way and report it.
    """
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    if wait and _connected.is_set():
        with contextlib.suppress(Exception):
            ocp.multihost.get_barrier_sync_fn()(key="failed", timeout_ms=1000 * _EXIT_SECONDS)
            jax.distributed.shutdown()
    # A regular exit would wait for the other processes, and for a save in which they do not participate.
    os._exit(status)
