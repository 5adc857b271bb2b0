"""Several processes as one program: they find each other, and make sure that they were told the same."""

import atexit
import logging
import os
import threading
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from dig_jax.errors import ConfigError, UserError

# Slots for checksums of settings: their number must be the same in all processes, whatever those know.
_SLOTS = 256


def join_processes(
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
