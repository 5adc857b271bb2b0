"""Runs of the smallest model, and what it means that two of them ended alike."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

# The smallest model, in two micro-batches over four devices.
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


def state_at(workdir: Path, step: int) -> dict:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(workdir / "checkpoints" / str(step) / "state")


def records(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on time."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "data_wait")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def assert_ended_alike(workdir: Path, other: Path, step: int) -> None:
    state = state_at(workdir, step)
    assert {"step", "params", "ema", "opt_state", "skipped_steps"} == set(state)
    jax.tree.map(np.testing.assert_array_equal, state, state_at(other, step))
    assert [record["step"] for record in records(workdir)] == list(range(1, step + 1))
    assert records(workdir) == records(other)
