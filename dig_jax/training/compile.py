"""The train step as a program for a mesh: what a run executes, and what a plan compiles ahead."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dig_jax.components import Components, Params
from dig_jax.parallel import batch_sharding, replicated, state_sharding
from dig_jax.training import step as steps
from dig_jax.training.optimizer import make_optimizer, make_schedule


def fresh_state(components: Components, params: Params | None = None) -> steps.State:
    """The state that a run starts from; of random parameters, where none are given."""
    params = steps.init_params(components) if params is None else params
    return steps.init_state(components, _optimizer(components), params)


def abstract_state(components: Components, mesh: Mesh) -> steps.State:
    """Shapes, dtypes and layout of the state; building it checks the model's settings.

    Raises:
        ConfigError: the config's model cannot be.
    """
    return laid_out(jax.eval_shape(lambda: fresh_state(components)), mesh)


def laid_out(state: Any, mesh: Mesh) -> Any:
    """Shapes and dtypes of a state, or of a part of it, with its layout on a mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_sharding(state, mesh),
    )


def abstract_batch(components: Components, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and layout of a batch of the config's size."""
    size, split = components.config.data.batch_size, batch_sharding(mesh)
    shape = components.image_spec.image_shape
    return {
        "image": jax.ShapeDtypeStruct((size, *shape), jnp.float32, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }


def lower_train_step(components: Components, mesh: Mesh, state: steps.State) -> jax.stages.Lowered:
    """The step (state, batch) → (state, metrics), which takes over its state's memory.

    Args:
        state: the arrays of one, or `abstract_state`.
    """
    settings = components.config
    train_step = jax.jit(
        functools.partial(
            steps.train_step,
            components,
            _optimizer(components),
            make_schedule(settings.optimizer, settings.training.steps),
        ),
        donate_argnums=0,
        out_shardings=(state_sharding(state, mesh), replicated(mesh)),
    )
    return train_step.lower(state, abstract_batch(components, mesh))


def _optimizer(components: Components) -> optax.GradientTransformation:
    return make_optimizer(components.config.optimizer, components.config.training.steps)
