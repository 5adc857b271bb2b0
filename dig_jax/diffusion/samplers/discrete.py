"""Samplers that visit the timesteps of a discrete Gaussian diffusion from the last to the first."""

import abc
import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dig_jax.diffusion.gaussian import GaussianDiffusion, Prediction, Steps
from dig_jax.diffusion.process import Denoiser, Images, Process
from dig_jax.diffusion.samplers.base import Loop, LoopSampler, Noise, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteSampler(LoopSampler):
    """A sampler that is defined by its move from x_t to x_{t-1}.

    `steps` chooses the timesteps in the notation of `space_timesteps`: a number spaces them evenly from the
    first to the last, "ddim50" takes an integer stride, and None keeps all.
    """

    @abc.abstractmethod
    def move(
        self,
        process: GaussianDiffusion,
        prediction: Prediction,
        x: Images,
        t: Steps,
        noise: Callable[[], Images],
    ) -> Images:
        """Return x_{t-1} given the prediction at x = x_t, for steps t of the respaced process."""

    def check(self, process: Process) -> None:
        """Raise ValueError if `process` is not a GaussianDiffusion or does not have these steps."""
        self._respaced(process)

    def fractions(self, process: Process) -> Float[np.ndarray, " n"]:
        """Return the times of the timesteps, from the last to the first."""
        respaced = self._respaced(process)
        return respaced.fractions(np.arange(respaced.length)[::-1])

    def discretize(self, process: Process, denoiser: Denoiser, noise: Noise) -> Loop:
        """Return the loop over the timesteps, from the last to the first."""
        respaced = self._respaced(process)

        def step(state: State, i: Int[Array, ""]) -> tuple[State, Images]:
            x = state[0]
            t = jnp.full(x.shape[:1], respaced.length - 1 - i)
            output = denoiser(x, respaced.timestep_input(t))
            prediction = respaced.p_mean_variance(output, x, t, clip=self.clip)
            return (self.move(respaced, prediction, x, t, functools.partial(noise, i)),), prediction.x0

        return Loop(respaced.length, step)

    def _respaced(self, process: Process) -> GaussianDiffusion:
        if not isinstance(process, GaussianDiffusion):
            raise ValueError(
                f"unsupported process for {type(self).__name__}: got {type(process).__name__}; expected"
                " GaussianDiffusion"
            )
        return process if self.steps is None else process.respaced(self.steps)
