"""One step of training: gradient, optimizer and averages, as a pure function of the state and a batch.

All random numbers of image i in step n are a function of (seed, n, i): they depend neither on devices nor on
micro-batches.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Key

from dig_jax.components import Params
from dig_jax.parallel import constrain_batch, kernel_platform
from dig_jax.training.objectives.auxiliary import AuxiliaryObjective
from dig_jax.training.objectives.denoising import Batch, Metrics
from dig_jax.training.optimizer import may_overflow
from dig_jax.training.state import Purpose, State, purpose_key
from dig_jax.training.train_setup import TrainSetup


def train_step(
    setup: TrainSetup, state: State, batch: Batch, distilled: Params | None = None
) -> tuple[State, Metrics]:
    """Take one optimizer step on a batch {"image": [B, h, w, c], "label": [B]}.

    `distilled` are the parameters of the model `setup.distilled`.

    A step whose loss, gradient or new parameters are not finite is skipped: it changes only `step` and
    `skipped_steps`.

    Returns:
        The new state, and the objective's metrics with "grad_norm", "learning_rate" and "skipped" (0 or 1).
    """
    key = jax.random.fold_in(purpose_key(setup.components, Purpose.TRAIN), state["step"])
    grads, metrics = _gradient(setup, state, batch, key, distilled)
    grad_norm = optax.tree.norm(grads)

    updates_before = state["step"] - state["skipped_steps"]
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    if may_overflow(setup.components.config.optimizer):
        finite &= _update_is_finite(setup, grads, state)
    kept = {name: state[name] for name in ("params", "ema", "opt_state")}

    def update() -> State:
        updates, opt_state = setup.optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = {
            name: average.update(state["ema"][name], params, updates_before)
            for name, average in setup.averages.items()
        }
        return {"params": params, "ema": ema, "opt_state": opt_state}

    skipped = 1 - finite.astype(jnp.int32)
    new_state = {
        **_if_finite(finite, update, kept),
        "step": state["step"] + 1,
        "skipped_steps": state["skipped_steps"] + skipped,
    }
    return new_state, {
        **metrics,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(setup.schedule(updates_before), jnp.float32),
        "skipped": skipped,
    }


def _if_finite(finite: Bool[Array, ""], update: Callable[[], State], kept: State) -> State:
    """Return `update()`, or `kept` if something is not finite.

    XLA selects without a copy on accelerators, where a branch needs more memory. On CPUs it copies parameters
    and moments before a select.
    """
    if kernel_platform() == "cpu":
        return jax.lax.cond(finite, update, lambda: kept)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(), kept)


def _update_is_finite(setup: TrainSetup, grads: Params, state: State) -> Bool[Array, ""]:
    """Return whether the new parameters are finite, although the gradient is.

    The update is computed once for this answer and once to be stored. The barrier keeps the compiler from
    merging the two, which would need memory for the old and the new state.
    """
    grads, opt_state, params = jax.lax.optimization_barrier((grads, state["opt_state"], state["params"]))
    updates, _ = setup.optimizer.update(grads, opt_state, params)
    leaves = jax.tree.leaves(optax.apply_updates(params, updates))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _gradient(
    setup: TrainSetup, state: State, batch: Batch, key: Key[Array, ""], distilled: Params | None
) -> tuple[Params, Metrics]:
    """Return gradient and metrics with the auxiliary losses of this step.

    The losses that have ended are left out of the program's branch, not multiplied by zero, so that what is
    left is computed bit for bit as without them, at no cost. Their metrics are NaN then.
    """

    def gradient(auxiliary: AuxiliaryObjective | None) -> tuple[Params, Metrics]:
        if auxiliary is None:
            return mean_gradient(setup, state["params"], batch, key)
        frozen = None if setup.distilled is None or distilled is None else (setup.distilled, distilled)
        objective = functools.partial(auxiliary, teacher=state["ema"][setup.teacher], distilled=frozen)
        return mean_gradient(dataclasses.replace(setup, objective=objective), state["params"], batch, key)

    until = setup.components.config.auxiliary.until
    if setup.auxiliary is None or until is None or setup.auxiliary == setup.lasting:
        return gradient(setup.auxiliary)
    missing: Metrics = {name: jnp.full((), jnp.nan) for name in setup.auxiliary.metric_names}

    def rest() -> tuple[Params, Metrics]:
        grads, metrics = gradient(setup.lasting)
        return grads, missing | metrics

    return jax.lax.cond(state["step"] < until, lambda: gradient(setup.auxiliary), rest)


def mean_gradient(
    setup: TrainSetup, params: Params, batch: Batch, key: Key[Array, ""]
) -> tuple[Params, Metrics]:
    """Return the gradient of the mean loss and the metrics, summed over micro-batches."""
    count = setup.components.config.training.accumulation
    size = batch["image"].shape[0]
    batch = batch | {"index": constrain_batch(jnp.arange(size))}
    gradient = jax.grad(
        lambda params, batch: setup.objective(setup.components, params, batch, key, size), has_aux=True
    )
    if count == 1:
        return gradient(params, batch)
    # Micro-batch m takes every count-th image, so that no image moves between devices.
    micro_batches = {
        name: x.reshape(size // count, count, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()
    }

    def add(total: tuple[Params, Metrics], micro_batch: Batch) -> tuple[tuple[Params, Metrics], None]:
        return jax.tree.map(jnp.add, total, gradient(params, micro_batch)), None

    shapes = jax.eval_shape(gradient, params, {name: x[0] for name, x in micro_batches.items()})
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, micro_batches)[0]
