"""AdamW (Loshchilov & Hutter 2019) with warmup, a learning-rate schedule and gradient clipping."""

import math

import optax

from dig_jax import config

_LARGEST_STEP = 1e6


def make_schedule(settings: config.OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warmup, then constant, or a cosine or linear decay.

    A decay ends with `final_fraction` of the peak at step number `steps`.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    decay_steps = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, settings.final_fraction),
        "linear": optax.linear_schedule(peak, peak * settings.final_fraction, decay_steps),
    }[settings.schedule]
    if not warmup:
        return after
    # Warmup starts at peak/warmup: a first step with a learning rate of 0 would change nothing.
    before = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([before, after], [warmup])


def make_optimizer(settings: config.OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW, after clipping by the global norm if `clip_norm` is set."""
    adamw = optax.adamw(
        make_schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
    )
    if settings.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)


def may_overflow(settings: config.OptimizerConfig) -> bool:
    """Return whether parameters could leave the range of float32 although all gradients are finite.

    By the Cauchy-Schwarz inequality AdamW moves a parameter by at most lr / √((1 - b1²/b2)(1 - b2)), and
    weight decay moves it away from zero only if lr · weight_decay > 2. Steps of at most `_LARGEST_STEP` do
    not leave the range within 2³¹ updates.
    """
    lr, b1, b2 = settings.learning_rate, settings.b1, settings.b2
    if b1**2 >= b2 or lr * settings.weight_decay > 2:
        return True
    return lr > _LARGEST_STEP * math.sqrt((1 - b1**2 / b2) * (1 - b2))
