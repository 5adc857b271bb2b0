"""The denoising objective: corrupt each image at a random time and train the denoiser on it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from dig_jax.components import Components, Params, model_options

Batch = dict[str, Array]
Metrics = dict[str, Array]

LEVELS = 4
"""Number of ranges of the noise level for which the loss is reported separately."""


class Draw(NamedTuple):
    """Random draws for each image of a batch: its time, its noise and whether its label is dropped.

    `kept` is the factor of what each block adds, with stochastic depth: 0, or 1 / (1 - rate).
    """

    times: Num[Array, " b"]
    noise: Float[Array, "b h w c"]
    drop: Bool[Array, " b"] | None = None
    kept: Float[Array, "blocks b"] | None = None


def draw(
    components: Components,
    key: Key[Array, ""],
    indices: Int[Array, " b"],
    shape: tuple[int, ...] | None = None,
) -> Draw:
    """Draw times, noise and dropped labels for the images at these indices of a batch.

    Each image has a separate key, so its draw depends neither on devices nor on micro-batches. `shape` is
    (height, width, channels) of the images, by default of `image_size`.
    """
    shape, rate = shape or components.image_spec.image_shape, components.config.training.label_dropout
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    for_times, for_noise, for_drop = jax.vmap(lambda key: tuple(jax.random.split(key, 3)))(keys)
    return Draw(
        components.diffusion.sample_times(for_times),
        jax.vmap(lambda key: jax.random.normal(key, shape))(for_noise),
        jax.vmap(lambda key: jax.random.bernoulli(key, rate))(for_drop),
        _draw_kept(model_options(components.config.model)[1].drop_rates, keys),
    )


def _draw_kept(
    rates: Float[np.ndarray, " blocks"], keys: Key[Array, " b"]
) -> Float[Array, "blocks b"] | None:
    """Return `Draw.kept` for the keys of the images; None if nothing is dropped."""
    if not rates.any():
        return None
    draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 3), rates.shape), out_axes=1)(
        keys
    )
    return (draws >= rates[:, None]) / jnp.float32(1 - rates)[:, None]


def losses(components: Components, params: Params, batch: Batch, drawn: Draw) -> Float[Array, " b"]:
    """Return the loss of each image."""
    process, x0 = components.diffusion, batch["image"]
    x_t = process.corrupt(x0, drawn.noise, drawn.times)
    output = predict(components, params, x_t, process.timestep_input(drawn.times), batch["label"], drawn)
    return process.loss(output, x0=x0, noise=drawn.noise, x_t=x_t, times=drawn.times)["loss"]


def predict(
    components: Components,
    params: Params,
    x_t: Float[Array, "b h w c"],
    timesteps: Num[Array, " b"],
    labels: Int[Array, " b"],
    drawn: Draw,
    **inputs: Any,
) -> Float[Array, "b h w out"]:
    """Return the network's output, with the dropped labels and the stochastic depth of the draws.

    `inputs` are further inputs of the network, such as `jump`.
    """
    condition = (params, x_t, timesteps, labels, drawn.drop)
    if drawn.kept is None:
        return components.denoise(*condition, **inputs)
    return components.model_spec.outputs(*condition, kept=drawn.kept, **inputs).output


def loss(
    components: Components, params: Params, batch: Batch, key: Key[Array, ""], batch_size: int
) -> tuple[Float[Array, ""], Metrics]:
    """Return the share of a micro-batch in the mean loss of the batch, and its metrics.

    The sum over the micro-batches of a batch gives the loss and the metrics of the batch.

    Args:
        components: model and process.
        params: parameters of the model.
        batch: {"image": [B, h, w, c], "label": [B], "index": [B], the index of each image in the batch}.
        key: the step's key.
        batch_size: number of images of the batch.

    Returns:
        The loss, and {"loss", "loss_sum" and "count" by range of the noise level [LEVELS]}.
    """
    drawn = draw(components, key, batch["index"], batch["image"].shape[1:])
    values = losses(components, params, batch, drawn)
    metrics = metrics_of(components, drawn, values, batch_size)
    return metrics["loss"], metrics


def metrics_of(components: Components, drawn: Draw, values: Float[Array, " b"], batch_size: int) -> Metrics:
    """Return the metrics of `loss` for the loss of each image."""
    # A sum of products, because accelerators would round a matrix product.
    level = jax.nn.one_hot(components.diffusion.level_index(drawn.times, LEVELS), LEVELS)
    mean = jnp.sum(values) / batch_size
    return {"loss": mean, "loss_sum": (values[:, None] * level).sum(0), "count": level.sum(0)}
