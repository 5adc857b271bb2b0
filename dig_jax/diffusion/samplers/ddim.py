"""DDIM: implicit sampling (Song et al. 2021)."""

import dataclasses
from collections.abc import Callable

import numpy as np

from dig_jax.diffusion.gaussian import GaussianDiffusion, Prediction, Steps, lookup
from dig_jax.diffusion.process import Images
from dig_jax.diffusion.samplers.discrete import DiscreteSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(DiscreteSampler):
    """x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - σ²) ε̂ + σ z (Song et al. 2021, eq. 12, 16).

    steps="ddim50" selects 50 timesteps as in the paper.

    Attributes:
        eta: from 0 (deterministic, σ = 0) to 1 (σ² is the variance β̃ of DDPM).
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta out of range: got {self.eta}; expected 0 … 1")

    def move(
        self,
        process: GaussianDiffusion,
        prediction: Prediction,
        x: Images,
        t: Steps,
        noise: Callable[[], Images],
    ) -> Images:
        """Return x_{t-1}."""
        variance = self.eta**2 * process.posterior_variance  # 0 at t = 0: the last step adds no noise
        signal, sigma = np.sqrt(process.alphas_cumprod_prev), np.sqrt(variance)
        direction = np.sqrt(1 - process.alphas_cumprod_prev - variance)
        x = lookup(signal, t, x) * prediction.x0 + lookup(direction, t, x) * prediction.epsilon
        return x + lookup(sigma, t, x) * noise() if self.eta else x
