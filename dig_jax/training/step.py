"""The train state and the pure functions on it: one step, and the loss on held-out images.

The state is a plain nested dict: step, params, ema/{decay}, opt_state, skipped_steps. All randomness of
step n and image i is a function of (seed, n, i), so it does not depend on devices or micro-batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dig_jax.components import Components, Params
from dig_jax.parallel import constrain_batch

State = dict[str, Any]
Batch = dict[str, Array]
Metrics = dict[str, Array]

QUARTERS = 4
# What a random number is for: the first fold of the seed's key.
_INIT, _TRAIN, _HELDOUT = range(3)


def _key(components: Components, purpose: int) -> Array:
    return jax.random.fold_in(jax.random.key(components.config.seed), purpose)


def init_params(components: Components) -> Params:
    """The random parameters that the config's seed stands for."""
    return components.init_params(_key(components, _INIT))


def init_state(components: Components, optimizer: optax.GradientTransformation, params: Params) -> State:
    """The state of a run that starts from these parameters: averages equal to them, step 0."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": dict.fromkeys(components.config.training.average_names, params),
        "opt_state": optimizer.init(params),
        "skipped_steps": jnp.zeros((), jnp.int32),
    }


def train_step(
    components: Components,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: State,
    batch: Batch,
) -> tuple[State, Metrics]:
    """One optimiser step on a batch {"image": [B, h, w, c], "label": [B]}.

    A step whose loss or gradient is not finite changes nothing but `step` and `skipped_steps`.

    Returns:
        The new state, and {"loss", "grad_norm", "learning_rate", "skipped" (0 or 1), "loss_sum" and
        "count" by quarter of the timesteps [4]}.
    """
    grads, metrics = _mean_gradient(components, state["params"], batch, state["step"])
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)

    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    ema = {
        name: optax.incremental_update(params, average, 1 - float(name))
        for name, average in state["ema"].items()
    }
    updated = {"params": params, "ema": ema, "opt_state": opt_state}
    kept = {name: state[name] for name in updated}
    skipped = 1 - finite.astype(jnp.int32)
    new_state = {
        **jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, kept),
        "step": state["step"] + 1,
        "skipped_steps": state["skipped_steps"] + skipped,
    }
    return new_state, {
        **metrics,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(schedule(state["step"] - state["skipped_steps"]), jnp.float32),
        "skipped": skipped,
    }


def heldout_loss(
    components: Components, params: Params, batch: Batch, first: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of losses, number of images) of a held-out batch that starts at image number `first`.

    Noise and timestep of an image are fixed by its number, the timesteps evenly spread (a Weyl sequence
    of the golden ratio), so that values of different steps can be compared.
    """
    numbers = first + jnp.arange(batch["image"].shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(_key(components, _HELDOUT), numbers)
    noise = jax.vmap(lambda key: jax.random.normal(key, batch["image"].shape[1:]))(keys)
    length = components.diffusion.length
    t = (numbers.astype(jnp.float32) * 0.618034 % 1.0 * length).astype(jnp.int32)

    def denoiser(x: Array, t: Array) -> Array:
        return components.denoise(params, x, t, batch["label"])

    losses = components.diffusion.loss(denoiser, batch["image"], t, noise)["loss"]
    return jnp.sum(losses * batch["mask"]), jnp.sum(batch["mask"].astype(jnp.float32))


def draw(
    components: Components, step: Int[Array, ""], numbers: Int[Array, " b"]
) -> tuple[Int[Array, " b"], Float[Array, "b h w c"], Bool[Array, " b"]]:
    """Timestep, noise and whether the label is dropped, of the images of these numbers in a step's batch."""
    key = jax.random.fold_in(_key(components, _TRAIN), step)
    shape = components.image_spec.image_shape

    def draw_one(number: Array) -> tuple[Array, Array, Array]:
        for_t, for_noise, for_drop = jax.random.split(jax.random.fold_in(key, number), 3)
        t = jax.random.randint(for_t, (), 0, components.diffusion.length)
        drop = jax.random.bernoulli(for_drop, components.config.training.label_dropout)
        return t, jax.random.normal(for_noise, shape), drop

    return jax.vmap(draw_one)(numbers)


def _mean_gradient(
    components: Components, params: Params, batch: Batch, step: Int[Array, ""]
) -> tuple[Params, Metrics]:
    """Gradient and metrics of the mean loss, summed over micro-batches."""
    parts = components.config.training.accumulation
    size = batch["image"].shape[0]
    batch = batch | {"number": constrain_batch(jnp.arange(size))}
    gradient = jax.grad(lambda params, batch: _loss(components, params, batch, step, size), has_aux=True)
    if parts == 1:
        return gradient(params, batch)
    # Micro-batch m takes every parts-th image, so that each device's share of it stays on that device.
    split = {name: x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}

    def add(total: tuple, part: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    shapes = jax.eval_shape(gradient, params, {name: x[0] for name, x in split.items()})
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, split)[0]


def _loss(
    components: Components, params: Params, batch: Batch, step: Int[Array, ""], size: int
) -> tuple[Float[Array, ""], Metrics]:
    """This part's share of the mean loss over a batch of `size` images."""
    t, noise, drop = draw(components, step, batch["number"])

    def denoiser(x: Array, t: Array) -> Array:
        return components.denoise(params, x, t, batch["label"], drop)

    losses = components.diffusion.loss(denoiser, batch["image"], t, noise)["loss"]
    # A sum of products and not a matrix product, which accelerators would round.
    quarter = jax.nn.one_hot(t * QUARTERS // components.diffusion.length, QUARTERS)
    loss = jnp.sum(losses) / size
    return loss, {"loss": loss, "loss_sum": (losses[:, None] * quarter).sum(0), "count": quarter.sum(0)}
