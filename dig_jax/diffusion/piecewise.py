"""Denoisers that change with time, and denoisers that remember.

A sampler knows its times before it runs. So a denoiser that is one function at high noise and another one at
low noise costs no branch at run time: the sampler runs one loop per range of time.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from dig_jax.diffusion.process import Denoiser, Images

# Times are compared up to this difference, because a sampler computes them.
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Remembering:
    """A denoiser that takes arrays from its previous evaluation and returns them for the next one.

    The memory starts anew in each range of time.

    Attributes:
        evaluate: (x, timesteps, memory) -> (output, memory).
        start: x -> memory before the first evaluation; by default zeros of its shape.
    """

    evaluate: Callable[[Images, Num[Array, " b"], Any], tuple[Float[Array, "b h w d"], Any]]
    start: Callable[[Images], Any] = jnp.zeros_like


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A denoiser for each range of time, from noise to data.

    Attributes:
        denoisers: one per range.
        bounds: the times between the ranges, decreasing, as fractions of the process; a time at a bound
            belongs to the range nearer to data.
    """

    denoisers: tuple[Denoiser | Remembering, ...]
    bounds: tuple[float, ...]


def ranges(bounds: tuple[float, ...], fractions: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return the index of the range of each time; see `Piecewise.bounds`."""
    return np.sum(np.asarray(fractions)[:, None] <= np.array(bounds) + TOLERANCE, axis=1)


AnyDenoiser = Denoiser | Remembering | Piecewise


def pieces(
    denoiser: AnyDenoiser, fractions: Float[np.ndarray, " n"]
) -> Iterator[tuple[Denoiser | Remembering, Int[np.ndarray, " m"]]]:
    """Yield each denoiser that a sampler uses, and the indices of its evaluations.

    Args:
        denoiser: any kind of denoiser.
        fractions: the time of each evaluation, from 0 (data) to 1 (noise).
    """
    if not isinstance(denoiser, Piecewise):
        yield denoiser, np.arange(len(fractions))
        return
    indices = ranges(denoiser.bounds, fractions)
    starts = [0, *(np.flatnonzero(np.diff(indices)) + 1), len(indices)]
    for first, last in zip(starts, starts[1:], strict=False):
        yield denoiser.denoisers[indices[first]], np.arange(first, last)


def spans(
    denoiser: AnyDenoiser, first: float, last: float
) -> Iterator[tuple[Denoiser | Remembering, float, float]]:
    """Yield each denoiser between two times, first > last, and the greatest and least time of its range."""
    if not isinstance(denoiser, Piecewise):
        yield denoiser, first, last
        return
    edges = [first, *(min(max(bound, last), first) for bound in denoiser.bounds), last]
    for part, start, end in zip(denoiser.denoisers, edges, edges[1:], strict=False):
        if start - end > 4 * TOLERANCE:
            yield part, start, end


class Session:
    """A denoiser for the body of a loop, which sets and reads `memory` around its one evaluation."""

    def __init__(self, denoiser: Denoiser | Remembering):
        self.denoiser = denoiser
        self.memory: Any = ()

    def start(self, x: Images) -> Any:
        """Return the memory before the first evaluation: () for denoisers without memory."""
        return self.denoiser.start(x) if isinstance(self.denoiser, Remembering) else ()

    def __call__(self, x: Images, timesteps: Num[Array, "b ..."]) -> Float[Array, "b h w d"]:
        """Evaluate the denoiser."""
        if not isinstance(self.denoiser, Remembering):
            return self.denoiser(x, timesteps)
        output, self.memory = self.denoiser.evaluate(x, timesteps, self.memory)
        return output
