"""Steps with the average velocity: z' = z - (t - t') u (Geng et al. 2025, equation 12)."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dig_jax.diffusion.mean_flow import as_mean_flow
from dig_jax.diffusion.process import Denoiser, Images, Process
from dig_jax.diffusion.samplers.base import Loop, LoopSampler, Noise, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlowSampler(LoopSampler):
    """Steps along the flow map of a `MeanFlow` model: `steps` evaluations; one is enough.

    The denoiser takes [B, 2]: timesteps, and the lengths of the steps as fractions of the process.
    """

    steps: int | str | None = 1

    def check(self, process: Process) -> None:
        """Raise ValueError for another process, invalid steps or clipping."""
        as_mean_flow(process, "meanflow").knots(self.steps)
        if self.clip:
            raise ValueError(
                "unsupported clip of meanflow, whose steps pass no predicted images; expected False"
            )

    def fractions(self, process: Process) -> Float[np.ndarray, " n"]:
        """Return the start of each step."""
        return process.knots(self.steps).times[:-1]

    def discretize(self, process: Process, denoiser: Denoiser, noise: Noise) -> Loop:
        """Return the loop over the steps."""
        mean_flow = as_mean_flow(process, "meanflow")
        knots = np.asarray(mean_flow.knots(self.steps).times, np.float32)

        def step(state: State, i: Int[Array, ""]) -> tuple[State, Images]:
            (z,) = state
            ones = jnp.ones(z.shape[:1], z.dtype)
            t, h = (jnp.asarray(x)[i] * ones for x in (knots[:-1], knots[:-1] - knots[1:]))
            output = denoiser(z, jnp.stack([mean_flow.timestep_input(t), h], axis=-1))
            u = mean_flow.average_velocity(output, z, t)
            return (z - h[:, None, None, None] * u,), z - t[:, None, None, None] * u

        return Loop(len(knots) - 1, step)
