"""The state that a run starts from: restored, initialized from another run, or random."""

import functools
import logging
import reprlib
from pathlib import Path

import jax
import numpy as np

from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.reader import read_model
from dig_jax.components import Params
from dig_jax.errors import ConfigError, naming_setting
from dig_jax.parallel import state_sharding
from dig_jax.training.run import Run
from dig_jax.training.state import State, fresh_state

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
    restored = checkpoints.restore(abstract)
    if restored is not None:
        state, data = restored
        _check_same_data(run, data)
        return state, data["examples"]
    params = None
    if run.settings.init_from is not None:
        params = _init_from(Path(run.settings.init_from), abstract["params"])
    layout = state_sharding(abstract, run.mesh)
    return jax.jit(functools.partial(fresh_state, run.components), out_shardings=layout)(params), 0


def _check_same_data(run: Run, stored: dict) -> None:
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


def _init_from(path: Path, expected: Params) -> Params:
    """Read parameters and shard them like `expected`."""
    with naming_setting("config.init_from"):
        _, step, params = read_model(path)
    shapes, wanted = _shapes(params), _shapes(expected)
    wrong = [name for name in sorted(shapes | wanted) if shapes.get(name) != wanted.get(name)]
    if wrong:
        raise ConfigError(
            f"config.init_from={path} has {len(wrong)} parameters that do not match this model; the first is"
            f" {wrong[0]}: got {shapes.get(wrong[0])}; expected {wanted.get(wrong[0])}"
        )
    log.info("initialized the parameters from %s, step %d", path, step)
    return jax.tree.map(
        lambda x, target: jax.make_array_from_callback(x.shape, target.sharding, np.asarray(x).__getitem__),
        params,
        expected,
    )


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(tree)}
