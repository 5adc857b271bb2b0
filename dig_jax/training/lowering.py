"""The train step as a program for a mesh: what a run executes, and what a plan compiles ahead."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dig_jax.experiment import Experiment, Params
from dig_jax.parallel import batch_sharding, replicated, state_sharding
from dig_jax.training import step as steps
from dig_jax.training.optimizer import make_optimizer, make_schedule


def fresh_state(experiment: Experiment, params: Params | None = None) -> steps.State:
    """The state that a run starts from; of random parameters, where none are given."""
    params = steps.init_params(experiment) if params is None else params
    return steps.init_state(experiment, _optimizer(experiment), params)


def abstract_state(experiment: Experiment, mesh: Mesh) -> steps.State:
    """Shapes, dtypes and layout of the state; building it checks the model's settings.

    Raises:
        ConfigError: the config's model cannot be.
    """
    return laid_out(jax.eval_shape(lambda: fresh_state(experiment)), mesh)


def laid_out(state: Any, mesh: Mesh) -> Any:
    """Shapes and dtypes of a state, or of a part of it, with its layout on a mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_sharding(state, mesh),
    )


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and layout of a batch of the config's size."""
    size, split = experiment.config.data.batch_size, batch_sharding(mesh)
    shape = experiment.images.image_shape
    return {
        "image": jax.ShapeDtypeStruct((size, *shape), jnp.float32, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }


def lower_train_step(experiment: Experiment, mesh: Mesh, state: steps.State) -> jax.stages.Lowered:
    """The step (state, batch) → (state, metrics), which takes over its state's memory.

    Args:
        state: the arrays of one, or `abstract_state`.
    """
    settings = experiment.config
    train_step = jax.jit(
        functools.partial(
            steps.train_step,
            experiment,
            _optimizer(experiment),
            make_schedule(settings.optimizer, settings.training.steps),
        ),
        donate_argnums=0,
        out_shardings=(state_sharding(state, mesh), replicated(mesh)),
    )
    return train_step.lower(state, abstract_batch(experiment, mesh))


def _optimizer(experiment: Experiment) -> optax.GradientTransformation:
    return make_optimizer(experiment.config.optimizer, experiment.config.training.steps)
