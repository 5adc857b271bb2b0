"""AdamW (Loshchilov & Hutter 2019) with a warm-up, a schedule and clipping."""

import optax

from dig_jax import config


def make_schedule(settings: config.OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step: a linear warm-up, then constant, or down to a fraction at `steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    decay_steps = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, settings.final_fraction),
        "linear": optax.linear_schedule(peak, peak * settings.final_fraction, decay_steps),
    }[settings.schedule]
    if not warmup:
        return after
    # From peak/warmup on: a first step with a learning rate of 0 would be wasted.
    before = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([before, after], [warmup])


def make_optimizer(settings: config.OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, where wanted, then AdamW."""
    adamw = optax.adamw(
        make_schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
    )
    return (
        optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
        if settings.clip_norm is not None
        else adamw
    )
