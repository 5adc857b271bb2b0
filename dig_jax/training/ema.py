"""Running averages of the parameters, by name.

The state holds them as `ema/{name}`. A name only identifies an average: the kind of an average and its
options belong to the `Average` object of that name.
"""

import dataclasses
import functools
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from dig_jax.checkpoints.power_function import exponent
from dig_jax.config import Config


@runtime_checkable
class Average(Protocol):
    """A kind of running average."""

    def update(self, average: PyTree, params: PyTree, updates: Int[Array, ""]) -> PyTree:
        """Return the average after one more update of the parameters.

        Args:
            average: the average so far; before the first update it equals the initial parameters.
            params: the updated parameters.
            updates: number of updates before this one, without skipped steps.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ExponentialAverage:
    """average ← decay · average + (1 - decay) · params."""

    decay: float

    def update(self, average: PyTree, params: PyTree, updates: Int[Array, ""]) -> PyTree:
        """Return the average after one more update of the parameters."""
        return optax.incremental_update(params, average, 1 - self.decay)


@dataclasses.dataclass(frozen=True)
class HalfLifeAverage:
    """An exponential average by its half-life in images (Karras et al. 2022, EDM, appendix F.1).

    With a ramp-up, the half-life is at most that fraction of the images seen before, so that the first update
    replaces the initial parameters.

    images_offset: the images seen are updates · batch_size + images_offset, see `TrainSetup.of`.
    """

    half_life: int
    rampup: float | None
    batch_size: int
    images_offset: int = 0

    def update(self, average: PyTree, params: PyTree, updates: Int[Array, ""]) -> PyTree:
        """Return the average after one more update of the parameters."""
        half_life = jnp.float32(self.half_life)
        if self.rampup is not None:
            longest = self.rampup * self.batch_size * updates.astype(jnp.float32)
            longest += self.rampup * self.images_offset
            # Skipped steps count with the current batch size, so this may be negative.
            half_life = jnp.minimum(half_life, jnp.maximum(longest, 0))
        # 1 - decay by expm1: the decay itself rounds to 1 in float32 for long half-lives.
        return optax.incremental_update(
            params, average, -jnp.expm1(-math.log(2) * self.batch_size / half_life)
        )


@dataclasses.dataclass(frozen=True)
class PowerFunctionAverage:
    """A power-function average by its relative length (`checkpoints/power_function.py`).

    Update t has the decay (1 - 1/t)^(γ+1) (Karras et al. 2024, EDM2, eq. 2).
    """

    length: float

    @functools.cached_property
    def exponent(self) -> float:
        """γ of the profile."""
        return exponent(self.length)

    def update(self, average: PyTree, params: PyTree, updates: Int[Array, ""]) -> PyTree:
        """Return the average after one more update of the parameters."""
        log_decay = (self.exponent + 1) * jnp.log1p(-1 / (updates.astype(jnp.float32) + 1))
        return optax.incremental_update(params, average, -jnp.expm1(log_decay))


def make_averages(settings: Config, images_offset: int = 0) -> dict[str, Average]:
    """Return the averages that a config asks for, by name; `images_offset` as in `TrainSetup.of`."""
    training = settings.training
    images = training.ema_rampup, settings.data.batch_size, images_offset
    kinds = (
        *map(ExponentialAverage, training.ema_decays),
        *(HalfLifeAverage(half_life, *images) for half_life in training.ema_half_lives),
        *map(PowerFunctionAverage, training.ema_lengths),
    )
    return dict(zip(training.average_names, kinds, strict=True))
