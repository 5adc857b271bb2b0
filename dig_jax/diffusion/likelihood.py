"""Terms of the variational bound: KL divergence of Gaussians and the likelihood of 8-bit pixels."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def normal_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """Return KL(N(mean1, exp(log_variance1)) ‖ N(mean2, exp(log_variance2))) in nats, elementwise."""
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + (mean1 - mean2) ** 2 * jnp.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Array, mean: Array, log_sigma: Array) -> Array:
    """Return the log-probability, in nats, of the 8-bit level x under a Gaussian, elementwise.

    The Gaussian is integrated over the bin of the level (Ho et al. 2020, eq. 13). Levels are -1, -1 + 2/255,
    …, 1; the two outermost bins extend to infinity. Probabilities are at least 1e-12.
    """
    upper = _standard_normal_cdf((x + 1 / 255 - mean) * jnp.exp(-log_sigma))
    lower = _standard_normal_cdf((x - 1 / 255 - mean) * jnp.exp(-log_sigma))
    probability = jnp.where(x > 0.999, 1.0, upper) - jnp.where(x < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(probability, 1e-12))


def _standard_normal_cdf(x: Array) -> Array:
    # Page's 1977 approximation, with an error of at most 2e-4: published models compute their bound with it.
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
