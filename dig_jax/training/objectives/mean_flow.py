"""The objective of MeanFlow: see `diffusion/mean_flow.py` for its derivation."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dig_jax.components import Components, Params
from dig_jax.diffusion.mean_flow import Jumps, MeanFlow
from dig_jax.diffusion.path import combine
from dig_jax.training.objectives.denoising import Batch, Draw, Metrics, draw, metrics_of

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
    x0, noise = batch["image"], drawn.noise
    z = process.corrupt(x0, noise, jumps.times)
    target = combine(x0, noise, "velocity", process.level(jumps.times, x0))
    frozen = jax.lax.stop_gradient(params)
    direction, weaker = instant_velocities(components, frozen, z, jumps, batch["label"], drawn)
    if weaker is not None:
        target += jumps.strength_here[:, None, None, None] * (direction - weaker)
    network = functools.partial(_network, components, params, labels=batch["label"], drawn=drawn)
    error = compound_velocity(network, z, jumps, direction) - target
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


def instant_velocities(
    components: Components,
    params: Params,
    z: Images,
    jumps: Jumps,
    labels: Int[Array, " b"],
    drawn: Draw,
) -> tuple[Images, Images | None]:
    """Return the network's velocity at z, and that of the null class if training guides away from it."""
    process = components.diffusion
    assert isinstance(process, MeanFlow)
    u = functools.partial(_network, components, params, labels=labels)
    if process.guidance_max == 1 or not components.image_spec.num_classes:
        return u(z, jumps.here, drawn=drawn), None
    all_dropped = drawn._replace(drop=jnp.ones(labels.shape, bool))
    return u(z, jumps.here, drawn=drawn), u(z, jumps.here.unguided, drawn=all_dropped)


def _network(
    components: Components,
    params: Params,
    z: Images,
    jumps: Jumps,
    *,
    labels: Int[Array, " b"],
    drawn: Draw,
) -> Images:
    process = components.diffusion
    assert isinstance(process, MeanFlow)
    timesteps = process.timestep_input(jumps.times)
    condition = (params, z, timesteps, labels, drawn.drop)
    if drawn.kept is None:
        output = components.denoise(*condition, jump=jumps.inputs)
    else:
        output = components.model_spec.outputs(*condition, kept=drawn.kept, jump=jumps.inputs).output
    return process.average_velocity(output, z, jumps.times)
