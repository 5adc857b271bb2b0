"""Several processes as one program: they find each other, agree, and end together."""

import atexit
import contextlib
import json
import logging
import os
import re
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dig_jax.errors import ConfigError, UserError

# Slots for checksums of settings: their number must be the same in all processes, whatever those know.
_SLOTS = 256

_LEAVING_SECONDS = 10
_LONGEST_WAIT_SECONDS = 7 * 24 * 3600
_joined = threading.Event()

T = TypeVar("T")


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300,
) -> None:
    """Makes this process one of several, as the arguments say, or the environment; else it stays alone.

    To be called before JAX is first used. JAX reads the environment itself: of TPU pods, SLURM and Open MPI.
    Processes but the first log only warnings.

    Args:
        coordinator: address:port of the first process.
        num_processes: how many there are.
        process_id: of this one, counted from 0.
        timeout: seconds to wait for the others.

    Raises:
        ConfigError: some arguments are given, but not all that the environment leaves open.
        UserError: after the time-out the processes are not complete.
    """
    given = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    _check(given)
    failure: list[Exception] = []

    def join() -> None:
        try:
            # With a time-out of its own JAX would end the process with a dump of its stack.
            jax.distributed.initialize(**given, initialization_timeout=10**6)
        except Exception as error:  # to be raised where it can be caught
            failure.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        atexit.register(_end_silently)
        address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "that the environment names")
        raise UserError(
            f"the processes did not find each other within {timeout:g} seconds; the coordinator is {address}:"
            " it must be reachable from all hosts, and all processes must be started"
        )
    if not failure:
        _joined.set()
        if jax.process_index():
            logging.getLogger("dig_jax").setLevel(logging.WARNING)
    elif any(value is not None for value in given.values()):
        raise ConfigError(f"--coordinator, --num_processes and --process_id: {failure[0]}") from failure[0]
    elif not isinstance(failure[0], ValueError):  # a ValueError: the environment is that of one process
        raise UserError(f"the processes could not be joined: {failure[0]}") from failure[0]


def _end_silently() -> None:
    """Keeps to itself what JAX's service says of its own end, after our line."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _check(given: Mapping[str, str | int | None]) -> None:
    coordinator, count, number = given.values()
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError(f"--coordinator={coordinator} is not of the form ADDRESS:PORT")
    if None not in (count, number) and not 0 <= number < count:
        raise ConfigError(f"--process_id={number} is not in 0…{count - 1}, as --num_processes={count} has it")


def check_agreement(settings: Mapping[str, object]) -> None:
    """Raises, in all processes, unless all of them were given the same settings.

    Args:
        settings: values by name, whose text is compared.

    Raises:
        ConfigError: names the settings that differ.
    """
    if jax.process_count() == 1:
        return
    texts = [f"{name}={value!r}" for name, value in sorted(settings.items())]
    sums = np.zeros(_SLOTS, np.uint32)
    sums[: len(texts)] = [zlib.crc32(text.encode()) for text in texts[:_SLOTS]]
    differs = (multihost_utils.process_allgather(sums) != sums).any(axis=0)
    everyone = multihost_utils.process_allgather(differs).any(axis=0)
    if everyone.any():
        here = [text for text, wrong in zip(texts, everyone, strict=False) if wrong]
        raise ConfigError(
            f"processes were given different settings; process {jax.process_index()} has"
            f" {', '.join(here[:5]) or 'fewer'}. Start all of them with the same command"
        )


def on_process_0(compute: Callable[[], T]) -> T:
    """What the first process computes, a JSON value, in all of them; the others wait.

    Raises:
        UserError: what `compute` raises in the first process, in all of them.
    """
    if jax.process_count() == 1:
        return compute()
    told, failure = {}, None
    if jax.process_index() == 0:
        try:
            told["value"] = compute()
        except UserError as error:
            failure, told["error"] = error, [str(error), isinstance(error, ConfigError)]
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(text.size))
    told = json.loads(multihost_utils.broadcast_one_to_all(np.resize(text, int(size))).tobytes())
    if "error" in told:
        text, of_config = told["error"]
        raise failure or (ConfigError if of_config else UserError)(text)
    return told["value"]


def processes_without(here: bool) -> list[int]:
    """The processes in which `here` is false."""
    if jax.process_count() == 1:
        return [] if here else [0]
    return np.flatnonzero(~multihost_utils.process_allgather(np.bool_(here))).tolist()


def barrier(what: str) -> None:
    """Returns when all processes are here, however long that takes; `what` names the place."""
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=what, timeout_ms=1000 * _LONGEST_WAIT_SECONDS)


def check_shared_directory(directory: Path) -> None:
    """Raises, in all processes, unless the first one's directory is there for all of them.

    Raises:
        UserError: names the processes that do not see it.
    """
    if jax.process_count() == 1:
        return
    with contextlib.ExitStack() as until_seen:
        # A name that nobody has asked for yet: file systems of networks remember what was not there.
        name = on_process_0(
            lambda: until_seen.enter_context(tempfile.NamedTemporaryFile(dir=directory, prefix=".seen-")).name
        )
        lacking = processes_without(Path(name).exists())
    if lacking:
        raise UserError(
            f"process {', '.join(map(str, lacking))} does not see what process 0 writes to {directory}:"
            " it must be on a file system that all hosts share"
        )


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether an exception says that another process no longer answers."""
    if error is None or not jax.distributed.is_initialized():
        return False
    signs = "gloo|nccl|coordination service|barrier|heartbeat|connection|socket|UNAVAILABLE|DEADLINE_EXCEEDED"
    told = isinstance(error, jax.errors.JaxRuntimeError) and re.search(signs, str(error), re.IGNORECASE)
    return bool(told) or is_peer_failure(error.__cause__)


def exit_process(status: int, *, wait: bool = True) -> NoReturn:
    """Ends this process, which has failed, though others may still count on it.

    Args:
        status: of the exit.
        wait: for the others to fail in the same way, so that each can say so; ten seconds at most.
    """
    if not _joined.is_set():
        sys.exit(status)
    sys.stdout.flush()
    # An exit as usual would wait minutes for the others, and for a save that they no longer take part in.
    if wait:
        with contextlib.suppress(Exception):
            ocp.multihost.get_barrier_sync_fn()(key="failed", timeout_ms=1000 * _LEAVING_SECONDS)
            jax.distributed.shutdown()
    os._exit(status)
