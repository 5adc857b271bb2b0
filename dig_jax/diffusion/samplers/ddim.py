"""DDIM: implicit sampling (Song et al. 2021), on any path.

Given a constant estimate of x_0, the posterior of a Gaussian process is N(α' x_0 + √(σ'² - s²) ε̂, s²), whose
marginal at the next knot is right for every s between 0 and σ' (Song et al. 2021, lemma 1). s² = η² β̃ with
the posterior variance of the Markov chain x_t = (α/α') x' + √(σ² - (α/α')² σ'²) z:

    β̃ = σ'²/σ² · (σ² - (α/α')² σ'²)

For DDPM's tables this is β̃_t. On the linear path with η = 0, DDIM and Euler's method are the same map.
"""

import dataclasses

import numpy as np

from dig_jax.diffusion.process import Process
from dig_jax.diffusion.samplers.linear import LinearSampler, Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(LinearSampler):
    """x' = α' x̂_0 + √(σ'² - s²) ε̂ + s z (Song et al. 2021, eq. 12, 16). Order 1 with eta=0.

    steps="ddim50" selects 50 timesteps as in the paper.

    Attributes:
        eta: from 0 (deterministic, s = 0) to 1 (s² is the variance β̃ of DDPM).
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta out of range: got {self.eta}; expected 0 … 1")

    def table(self, process: Process) -> Table:
        """Return one row per step."""
        times, level = process.knots(self.steps)
        alpha, sigma = level.alpha[:-1], level.sigma[:-1]
        alpha_next, sigma_next = level.alpha[1:], level.sigma[1:]
        variance = (sigma_next / sigma) ** 2 * (sigma**2 - (alpha / alpha_next * sigma_next) ** 2)
        noise = self.eta * np.sqrt(np.maximum(variance, 0))
        direction = np.sqrt(sigma_next**2 - noise**2)
        weights = np.stack([direction / sigma, alpha_next - direction * alpha / sigma, noise], axis=-1)
        return Table(times[:-1], weights[:, None])
