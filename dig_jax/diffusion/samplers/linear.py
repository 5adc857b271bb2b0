"""Samplers that are linear in x and in the predicted images: a table of coefficients and one loop.

Every method here evaluates the denoiser at one x per iteration, and moves on by a fixed linear combination of
what it holds: x, arrays kept from earlier iterations, the predicted image D and fresh noise z. So a method is
a function of the knots that fills a table in float64, and one loop runs them all.

With x_t = α x + σ ε and the predictions x̂ = D, ε̂ = (x_t - α D)/σ, these combinations appear:

    velocity    α̇ D + σ̇ ε̂ = (σ̇/σ) x_t - (ω/σ) D,   ω = α σ̇ - α̇ σ
    exact flow of a constant D from one knot to the next, the step of DDIM:
                α' D + σ' ε̂ = (σ'/σ) x_t + (α' - σ' α/σ) D

The last step, to σ' = 0, takes x' = D in every ODE method: there the velocity of variance-preserving paths
and the log-SNR of all paths are infinite.
"""

import abc
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Num

from dig_jax.diffusion.path import Level
from dig_jax.diffusion.process import Denoiser, Images, Process
from dig_jax.diffusion.samplers.base import Loop, LoopSampler, Noise, State


@dataclasses.dataclass(frozen=True)
class Table:
    """A method on given knots.

    Attributes:
        times: the process's time of each evaluation [n].
        weights: coefficients [n, m, m + 2] of the next state of m arrays in the state, the predicted image
            and the noise.
        start: scale of the noise that x starts from, as a multiple of the process's noise scale.
        per_step: evaluations of a step.
    """

    times: Num[np.ndarray, " n"]
    weights: Float64[np.ndarray, "n state in"]
    start: float = 1.0
    per_step: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSampler(LoopSampler):
    """A sampler that is defined by its table.

    `steps` is a positive number for `FlowMatching`, and for `GaussianDiffusion` as in `space_timesteps`.
    """

    @abc.abstractmethod
    def table(self, process: Process) -> Table:
        """Return the coefficients of the method, or raise ValueError as `check`."""

    def check(self, process: Process) -> None:
        """Raise ValueError if the process is not supported or does not have these steps."""
        self.table(process)

    def fractions(self, process: Process) -> Float64[np.ndarray, " n"]:
        """Return the times of the table's rows."""
        return process.fractions(self.table(process).times)

    def discretize(self, process: Process, denoiser: Denoiser, noise: Noise) -> Loop:
        """Return the loop over the rows of the table."""
        table = self.table(process)
        size = table.weights.shape[1]
        used = np.any(table.weights != 0, axis=0)

        def step(state: State, i: Int[Array, ""]) -> tuple[State, Images]:
            x = state[0]
            times = table.times.astype(np.int32 if table.times.dtype.kind == "i" else x.dtype)
            t = jnp.full(x.shape[:1], jnp.asarray(times)[i])
            x0 = process.predict_image(denoiser(x, process.timestep_input(t)), x, t, clip=self.clip)
            values = [*state, x0, noise(i) if used[:, -1].any() else x0]
            weights = jnp.asarray(table.weights, x.dtype)[i]
            # A sum of products, because accelerators would round a matrix product.
            moved = [
                [weights[row, column] * values[column] for column in np.flatnonzero(used[row])]
                for row in range(size)
            ]
            return tuple(functools.reduce(jnp.add, terms) if terms else 0 * x for terms in moved), x0

        return Loop(len(table.times), step, size - 1, table.start, table.per_step)


def velocity_row(level: Level, i: int) -> Float64[np.ndarray, " 2"]:
    """Return the coefficients of x and D in the velocity at knot i."""
    return np.array([level.sigma_dot[i], -level.omega[i]]) / level.sigma[i]
