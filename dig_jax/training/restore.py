"""The state that a run starts from: restored, initialized from another run, or random."""

import functools
import logging
import math
import reprlib

import jax
import numpy as np
from jaxtyping import Array

from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.components import Components
from dig_jax.config import Config, announced_changes
from dig_jax.errors import ConfigError
from dig_jax.parallel import state_sharding
from dig_jax.training.optimizer import make_schedule
from dig_jax.training.run import Run
from dig_jax.training.state import State, fresh_state, init_params
from dig_jax.training.warm_start import WarmStart, complete, read_warm_start

log = logging.getLogger(__name__)


def first_state(run: Run, abstract: State, checkpoints: Checkpoints) -> tuple[State, int]:
    """Return the state to start from and the number of training examples consumed so far.

    Args:
        run: the run.
        abstract: shapes, dtypes and shardings of the state.
        checkpoints: the run's checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but none can be restored.
        ConfigError: the workdir was trained on different data, or `init_from` does not match the model.
    """
    stored = []

    def check(data: dict, settings: Config) -> None:
        check_same_data(run, data)
        stored.append(settings)

    restored = checkpoints.restore(abstract, check)
    if restored is not None:
        state, data = restored
        _check_steps(run, int(state["step"]))
        _announce_changes(stored[0], run.settings, int(state["step"] - state["skipped_steps"]))
        return state, data["examples"]
    start = WarmStart({}, ())
    if run.settings.init_from is not None:
        start = read_warm_start(run.settings.init_from, run.components, abstract["params"])
    layout = state_sharding(abstract, run.mesh)
    make = functools.partial(_new_state, run.components, start.known_rows)
    return jax.jit(make, out_shardings=layout)(start.arrays), 0


def _new_state(components: Components, known_rows: tuple[bool, ...], arrays: dict[str, Array]) -> State:
    """Return a state at step 0 with known parameters; the others are random."""
    return fresh_state(components, complete(init_params(components), arrays, known_rows))


def _check_steps(run: Run, done: int) -> None:
    if run.settings.training.steps < done:
        raise ConfigError(
            f"invalid config.training.steps={run.settings.training.steps}; expected at least {done}, which is"
            f" what the run in {run.workdir} has done"
        )


def _announce_changes(old: Config, new: Config, updates: int) -> None:
    """Log the settings that changed since the checkpoint, and a change of the next step's learning rate."""
    if changes := announced_changes(old, new):
        log.info("changed since the checkpoint: %s", "; ".join(changes))
    before, after = (
        float(np.asarray(make_schedule(c.optimizer, c.training.steps)(updates))) for c in (old, new)
    )
    if not math.isclose(before, after, rel_tol=1e-6):
        log.warning("the learning rate of the next step changes from %.3g to %.3g", before, after)


def check_same_data(run: Run, stored: dict) -> None:
    """Raise a ConfigError unless the `data` item of a checkpoint is of the run's data."""
    current = run.data_item(stored["examples"])
    changed = [
        f"{name}: {reprlib.repr(value)} → {reprlib.repr(current.get(name))}"
        for name, value in stored.items()
        if value != current.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{run.workdir} was trained on different data: {'; '.join(changed)}. Use a new --workdir or"
            " restore the data"
        )
