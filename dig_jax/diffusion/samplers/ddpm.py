"""DDPM: ancestral sampling (Ho et al. 2020)."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from dig_jax.diffusion.gaussian import GaussianDiffusion, Prediction, Steps
from dig_jax.diffusion.process import Images
from dig_jax.diffusion.samplers.discrete import DiscreteSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(DiscreteSampler):
    """x_{t-1} = μ + √Σ z, without noise at t = 0 (Ho et al. 2020, algorithm 2)."""

    def move(
        self,
        process: GaussianDiffusion,
        prediction: Prediction,
        x: Images,
        t: Steps,
        noise: Callable[[], Images],
    ) -> Images:
        """Return a sample of the model's p(x_{t-1} | x_t)."""
        z = jnp.exp(0.5 * prediction.log_variance) * noise()
        return prediction.mean + jnp.where(t[:, None, None, None] > 0, z, 0)
