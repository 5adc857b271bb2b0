"""The train state: a nested dict of step, params, ema/{name}, opt_state and skipped_steps."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Key

from dig_jax.components import Components, Params
from dig_jax.parallel import state_sharding
from dig_jax.training.objectives.auxiliary import init_heads
from dig_jax.training.train_setup import TrainSetup

State = dict[str, Any]


class Purpose(enum.IntEnum):
    """Purpose of random numbers, which is folded into the seed's key first."""

    INIT = 0
    TRAIN = 1
    HELDOUT = 2
    HEADS = 3


def purpose_key(components: Components, purpose: Purpose) -> Key[Array, ""]:
    """Return the key of all random numbers for one purpose."""
    return jax.random.fold_in(jax.random.key(components.config.seed), int(purpose))


def init_params(components: Components) -> Params:
    """Return the random initial parameters for the config's seed, with the heads of auxiliary losses."""
    params = components.init_params(purpose_key(components, Purpose.INIT))
    return params | init_heads(components, purpose_key(components, Purpose.HEADS))


def init_state(setup: TrainSetup, params: Params) -> State:
    """Return the state at step 0 for these parameters; all averages equal the parameters."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": dict.fromkeys(setup.averages, params),
        "opt_state": setup.optimizer.init(params),
        "skipped_steps": jnp.zeros((), jnp.int32),
    }


def fresh_state(components: Components, params: Params | None = None) -> State:
    """Return the state that a run starts from, with random parameters by default."""
    setup = TrainSetup.of(components)  # checks the settings first
    return init_state(setup, init_params(components) if params is None else params)


def abstract_state(components: Components, mesh: Mesh) -> State:
    """Return shapes, dtypes and shardings of the state.

    Raises:
        ConfigError: the config's model is invalid.
    """
    return with_sharding(jax.eval_shape(lambda: fresh_state(components)), mesh)


def with_sharding(tree: Any, mesh: Mesh) -> Any:
    """Return shapes and dtypes of a state, or of a subtree, with its shardings on a mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        state_sharding(tree, mesh),
    )
