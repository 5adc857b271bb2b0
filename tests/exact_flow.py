"""Data whose denoiser, flow and guidance are known in closed form: N(mean, std²) in every pixel.

With x ~ N(m, s²) and x_t = α x + σ ε, the pair (x, x_t) is Gaussian, so that

    E[x | x_t] = m + α s²/(α² s² + σ²) · (x_t - α m)

The flow dx/dt = E[v | x_t] keeps the number of deviations from the mean: it maps x_t to
α' m + √(α'² s² + σ'²)/√(α² s² + σ²) · (x_t - α m). A guided combination of two classes with the same
deviation and the means m_c, m_u is the class with the mean m_u + w (m_c - m_u).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.diffusion import FlowMatching
from dig_jax.diffusion.path import Level, combine

MEAN, STD = 0.7, 0.3


@dataclasses.dataclass(frozen=True)
class Interior(FlowMatching):
    """Flow matching whose samplers start at t = 0.98 and stop at 0.02, where every method is at its order."""

    def knots(self, steps):
        return self.knots_at(np.linspace(0.98, 0.02, steps + 1))


def denoiser(process, mean=MEAN, std=STD):
    """The exact denoiser of a flow-matching process, as its prediction asks."""

    def denoise(x, timesteps):
        level = Level(*(part[:, None, None, None] for part in process.path.at(timesteps / 1000)))
        gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
        image = mean + gain * (x - level.alpha * mean)
        return combine(image, (x - level.alpha * image) / level.sigma, process.prediction, level)

    return denoise


def flow(path, x, t, t_next, mean=MEAN, std=STD):
    """The exact flow of x from one time to another."""
    now, then = path.at(np.float64(t)), path.at(np.float64(t_next))
    scale = np.sqrt((then.alpha**2 * std**2 + then.sigma**2) / (now.alpha**2 * std**2 + now.sigma**2))
    return then.alpha * mean + scale * (x - now.alpha * mean)


def noise_of(shape):
    """Standard normal noise by index, for stochastic samplers."""
    return lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)


def start(seed=0, shape=(4, 2, 2, 1)):
    """Fixed noise."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def no_noise(i):
    raise AssertionError("a deterministic sampler drew noise")
