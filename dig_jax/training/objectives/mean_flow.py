"""The objective of MeanFlow: see `diffusion/mean_flow.py` for its derivation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dig_jax.components import Components, Params
from dig_jax.diffusion.mean_flow import Jumps, MeanFlow
from dig_jax.training.objectives.denoising import Batch, Draw, Metrics, draw, metrics_of, predict

Images = Float[Array, "b h w c"]
AverageVelocity = Callable[[Images, Jumps], Images]
"""(z_t, jumps) -> u."""

_ROUNDING = 0.01  # keeps the weight of a perfect image finite


def loss(
    components: Components, params: Params, batch: Batch, key: Key[Array, ""], batch_size: int
) -> tuple[Float[Array, ""], Metrics]:
    """Return the share of a micro-batch in the loss of the batch, and its metrics.

    Each image's squared error is divided by itself, without a gradient (Geng et al. 2025, section 4.3), so
    that the loss is about 1 whatever the error is. The metrics hold the mean squared error.

    Args and returns: as `denoising.loss`.
    """
    error, drawn = errors(components, params, batch, key)
    total = jnp.sum(error**2, axis=(1, 2, 3))
    weighted = total / jax.lax.stop_gradient(total + _ROUNDING)
    metrics = metrics_of(components, drawn, jnp.mean(error**2, axis=(1, 2, 3)), batch_size)
    return jnp.sum(weighted) / batch_size, metrics


def errors(components: Components, params: Params, batch: Batch, key: Key[Array, ""]) -> tuple[Images, Draw]:
    """Return V minus its target for each image, and the draws with the times of the steps' starts."""
    process = components.diffusion
    assert isinstance(process, MeanFlow)
    drawn = draw(components, key, batch["index"], batch["image"].shape[1:])
    jumps = draw_jumps(process, key, batch["index"], drawn)
    x0, frozen = batch["image"], jax.lax.stop_gradient(params)
    z = process.corrupt(x0, drawn.noise, jumps.times)
    target = process.targets(x0, drawn.noise, jumps.times)

    def u(params: Params, z: Images, jumps: Jumps, drawn: Draw = drawn) -> Images:
        timesteps = process.timestep_input(jumps.times)
        output = predict(components, params, z, timesteps, batch["label"], drawn, jump=jumps.inputs)
        return process.average_velocity(output, z, jumps.times)

    direction = u(frozen, z, jumps.here)
    if process.guidance_max > 1 and components.image_spec.num_classes:
        all_dropped = drawn._replace(drop=jnp.ones(jumps.times.shape, bool))
        weaker = u(frozen, z, jumps.here.unguided, all_dropped)
        target += jumps.strength_here[:, None, None, None] * (direction - weaker)
    error = compound_velocity(functools.partial(u, params), z, jumps, direction) - target
    return error, drawn._replace(times=jumps.times)


def draw_jumps(process: MeanFlow, key: Key[Array, ""], indices: Int[Array, " b"], drawn: Draw) -> Jumps:
    """Draw the steps of the images at these indices of a batch, from their first times."""
    # `draw` takes the children 0 to 3 of these keys.
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, index), 4))(indices)
    drop = jnp.zeros(indices.shape, bool) if drawn.drop is None else drawn.drop
    return process.sample_jumps(keys, drawn.times, drop)


def compound_velocity(u: AverageVelocity, z: Images, jumps: Jumps, direction: Images) -> Images:
    """Return V = u + h du/dt, whose gradient is that of u."""

    def along(z: Images, times: Array, lengths: Array) -> Images:
        return u(z, jumps._replace(times=times, lengths=lengths))

    ones = jnp.ones_like(jumps.times)
    average, change = jax.jvp(along, (z, jumps.times, jumps.lengths), (direction, ones, ones))
    return average + jumps.lengths[:, None, None, None] * jax.lax.stop_gradient(change)
