"""The compiled train step, for a run to execute and for a plan to compile ahead of time."""

import functools
import logging
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dig_jax.components import Components
from dig_jax.errors import naming_implementation
from dig_jax.parallel import batch_sharding, replicated, state_sharding
from dig_jax.progress import duration
from dig_jax.runtime import cache_hits
from dig_jax.training.objectives.auxiliary import Frozen
from dig_jax.training.state import State
from dig_jax.training.step import train_step
from dig_jax.training.train_setup import TrainSetup

log = logging.getLogger(__name__)


Shape = tuple[int, int, int]


def abstract_batch(
    components: Components, mesh: Mesh, shape: Shape | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, dtypes and shardings of a batch of the config's size.

    Args:
        components: the config's components.
        mesh: devices to run on.
        shape: (height, width, channels) of the images; by default the largest of training.
    """
    size, split = components.config.data.batch_size, batch_sharding(mesh)
    shape = shape or components.largest_shape
    shapes = {"image": (shape, jnp.float32), "label": ((), jnp.int32)}
    if components.stored_features is not None:
        shapes["features"] = (components.stored_features.shape, jnp.float16)
    return {
        name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }


def lower_train_step(
    components: Components,
    mesh: Mesh,
    state: State,
    distilled: Frozen | None = None,
    shape: Shape | None = None,
    images_offset: int = 0,
) -> jax.stages.Lowered:
    """Lower the step (state, batch) -> (state, metrics), which donates the state's memory.

    Args:
        components: the config's components.
        mesh: devices to run on.
        state: arrays, or an `abstract_state`.
        distilled: the model of `auxiliary.distill_from`, whose parameters are a third argument of the step.
        shape: as for `abstract_batch`.
        images_offset: as for `TrainSetup.of`.

    Raises:
        ConfigError: `model.implementation` does not run on these devices.
    """
    spec, *params = distilled or [None]
    step = jax.jit(
        functools.partial(train_step, TrainSetup.of(components, spec, images_offset)),
        donate_argnums=0,
        out_shardings=(state_sharding(state, mesh), replicated(mesh)),
    )
    with naming_implementation():
        return step.lower(state, abstract_batch(components, mesh, shape), *params)


def compile_train_step(
    components: Components,
    mesh: Mesh,
    state: State,
    distilled: Frozen | None = None,
    shape: Shape | None = None,
    images_offset: int = 0,
) -> jax.stages.Compiled:
    """Compile the train step ahead of the first step, and log how long that took; see `lower_train_step`."""
    began = time.monotonic()
    with cache_hits() as hits:
        compiled = lower_train_step(components, mesh, state, distilled, shape, images_offset).compile()
    how = "loaded the train step from the compilation cache" if hits else "compiled the train step"
    log.info("%s in %s", how, duration(time.monotonic() - began))
    return compiled
