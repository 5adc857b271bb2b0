"""Running averages of the parameters, by name.

The state holds them as `ema/{name}`. A name only identifies an average: the kind of an average and its
options belong to the `Average` object of that name.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import optax
from jaxtyping import Array, Int, PyTree

from dig_jax.config import TrainingConfig


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


def make_averages(settings: TrainingConfig) -> dict[str, Average]:
    """Return the averages that a config asks for, by name."""
    kinds = map(ExponentialAverage, settings.ema_decays)
    return dict(zip(settings.average_names, kinds, strict=True))
