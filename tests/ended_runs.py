"""Runs of small models from the command line, and the comparison of their results."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

# The smallest model, with two micro-batches on four devices.
FIELDS = {
    "model.name": "DiT-S/2",
    "model.depth": 1,
    "model.hidden_size": 16,
    "data.batch_size": 8,
    "training.accumulation": 2,
    "training.steps": 6,
    "training.ema_decays": (0.9,),
    "checkpoint.every_steps": 2,
    "logging.every_steps": 1,
    "logging.heldout_every_steps": 0,
    "logging.tensorboard": False,
    "sampling.every_steps": 0,
}


def command(name: str, workdir: Path, fields: Mapping[str, object], *arguments: str) -> list[str]:
    """The command of a run in the repository, whose config is NAME or NAME.py:ARGUMENT."""
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    return [
        sys.executable,
        "main.py",
        f"--config=configs/{name if '.py' in name else name + '.py'}",
        f"--workdir={workdir}",
        *overrides,
        *arguments,
    ]


def joined(count: int, port: int | None = None) -> list[list[str]]:
    """The flags that join `count` processes on this machine, by process; no flags for one process."""
    if count == 1:
        return [[]]
    port = port or free_port()
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", "--join_timeout=120"]
    return [[*flags, f"--process_id={number}"] for number in range(count)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Variables of joined processes, in addition to `environment`.
GLOO = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def environment(compiled: Path | None = None, *, optimized: bool = False) -> dict[str, str]:
    """Variables of runs. Those that are killed need a cache of compiled programs of their own."""
    return (
        {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        | {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimized))}
        | ({"JAX_COMPILATION_CACHE_DIR": str(compiled)} if compiled else {})
    )


def state_at(workdir: Path, step: int) -> dict:
    """Read the state of a step onto one device."""
    with ocp.StandardCheckpointer() as reader:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        path = workdir / "checkpoints" / str(step) / "state"
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            reader.metadata(path).item_metadata.tree,
        )
        return reader.restore(path, target)


def records(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl without the metrics that depend on time."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "data_wait")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def assert_ended_alike(workdir: Path, other: Path, step: int) -> None:
    state = state_at(workdir, step)
    assert {"step", "params", "ema", "opt_state", "skipped_steps"} == set(state)
    jax.tree.map(np.testing.assert_array_equal, state, state_at(other, step))
    assert [record["step"] for record in records(workdir)] == list(range(1, step + 1))
    assert records(workdir) == records(other)
