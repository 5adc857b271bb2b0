"""AdamW (Loshchilov & Hutter 2019) with warmup, a learning-rate schedule and gradient clipping."""

import optax

from dig_jax import config


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
