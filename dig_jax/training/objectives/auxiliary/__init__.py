"""Auxiliary losses: terms that add to the denoising loss, on its images, times and noise."""

from dig_jax.training.objectives.auxiliary.heads import init_heads
from dig_jax.training.objectives.auxiliary.objective import (
    AuxiliaryObjective,
    Frozen,
    make_auxiliary,
)

__all__ = ["AuxiliaryObjective", "Frozen", "init_heads", "make_auxiliary"]
