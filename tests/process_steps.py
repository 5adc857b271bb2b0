"""Steps that two processes take together, as a script: it prints the outcome of each step as JSON."""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from dig_jax.errors import ConfigError, UserError
from dig_jax.parallel import (
    barrier,
    check_agreement,
    distributed,
    exit_process,
    gather_arrays,
    initialize_distributed,
    is_peer_failure,
    on_process_0,
    processes_without,
)
from dig_jax.testing import tiny_settings
from dig_jax.training.workdir import claim_workdir

OWN_FOLDER = 100  # a file descriptor


def in_parts(arrays):
    """Gather 64 bytes at a time; return the lengths if the values are right."""
    with mock.patch.object(distributed, "_PART", 64):
        gathered = [part["x"] for part in gather_arrays(arrays)]
    return [len(x) for x in gathered if (x == np.arange(len(x))).all()]


def main(port, number, folder):
    """Take all steps; then process 1 dies."""
    initialize_distributed(f"127.0.0.1:{port}", 2, number, 120)

    def reject():
        raise ConfigError("rejected by process 0")

    # The same path leads each process to a folder of its own.
    (folder / f"own {number}").mkdir()
    os.dup2(os.open(folder / f"own {number}", os.O_RDONLY), OWN_FOLDER)
    steps = {
        "same settings": lambda: check_agreement({"seed": 0}),
        "different settings": lambda: check_agreement({"seed": 0, "config.training.steps": 20 + number}),
        "broadcast": lambda: on_process_0(lambda: {"index": jax.process_index()}),
        "rejection": lambda: on_process_0(reject),
        "gather": lambda: [part["x"].tolist() for part in gather_arrays({"x": np.arange(number + 2) / 3})],
        "gather in parts": lambda: in_parts({"x": np.arange(number * 100)}),
        "sizes beyond int32": lambda: distributed._gathered_sizes(3 * 2**31 + number),
        "without": lambda: processes_without(number == 0),
        "shared workdir": lambda: claim(tiny_settings(), folder / "run"),
        "workdir of different settings": lambda: claim(
            tiny_settings(training__label_dropout=0.2), folder / "run"
        ),
        "workdirs of their own": lambda: claim(tiny_settings(), Path(f"/proc/self/fd/{OWN_FOLDER}/run")),
    }
    outcomes = {name: outcome(step) for name, step in steps.items()}
    barrier("before the death of process 1")
    if number:
        sys.stdout.write(json.dumps(outcomes))
        sys.stdout.flush()
        os._exit(9)
    outcomes["peer failure"] = failure(lambda: check_agreement({"seed": 0}))
    sys.stdout.write(json.dumps(outcomes))
    exit_process(3, wait=False)


def claim(settings, workdir):
    """Hold the workdir for a moment."""
    with claim_workdir(settings, workdir):
        pass


def outcome(step):
    """What a step returns, or its error and whether that is one of the configuration."""
    try:
        return step()
    except UserError as error:
        return [str(error), isinstance(error, ConfigError)]


def failure(step):
    """Whether the exception that a step raises sooner or later means that a process died."""
    try:
        while True:
            step()
    except Exception as error:
        return is_peer_failure(error)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
