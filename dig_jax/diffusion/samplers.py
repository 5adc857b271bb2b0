"""Samplers of a Gaussian diffusion, from noise to images: each one `lax.scan` over the steps.

A sampler knows a denoiser, not a network, labels or guidance. Noise comes from the caller as a function of
the step, so that an image's noise can be derived from its own seed, whatever the batch around it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dig_jax.diffusion.gaussian import Denoiser, GaussianDiffusion, Prediction, lookup
from dig_jax.errors import suggest

Noise = Callable[[Int[Array, ""]], Float[Array, "b h w c"]]
"""(traced index 0 … steps-1 of the executed step) -> standard normal noise of the images' shape."""

Samples = Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], Float[Array, "steps b h w c"]]


def ddpm(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Array, "b h w c"],
    noise: Noise,
    *,
    steps: int | str | None = None,
    clip: bool = False,
    return_trajectory: bool = False,
) -> Samples:
    """Ancestral sampling: x_{t-1} = μ + √Σ z, without noise at t = 0 (Ho et al. 2020, algorithm 2).

    Args:
        diffusion: the process the denoiser was trained on.
        denoiser: (x [B, H, W, C], original timesteps [B]) -> [B, H, W, 2C or C].
        x_T: standard normal noise to start from; the result has its dtype.
        noise: noise(i), called once per step; what it returns for the last one is not used.
        steps: which timesteps to execute, in the notation of `space_timesteps`: a number spaces them evenly
            from the first to the last; None executes all.
        clip: limit every predicted x_0 to [-1, 1], for pixels.
        return_trajectory: also return the x_0 predicted at each step [steps, B, H, W, C].

    Returns:
        The images [B, H, W, C], or (images, trajectory).
    """
    process = diffusion if steps is None else diffusion.respaced(steps)

    def move(prediction, x, t, i):
        z = jnp.exp(0.5 * prediction.log_variance) * noise(i)
        return prediction.mean + jnp.where(t[:, None, None, None] > 0, z, 0)

    return _reverse(process, denoiser, x_T, move, clip, return_trajectory)


def ddim(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Array, "b h w c"],
    noise: Noise,
    *,
    steps: int | str | None = None,
    eta: float = 0.0,
    clip: bool = False,
    return_trajectory: bool = False,
) -> Samples:
    """Implicit sampling: x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1 - ᾱ_{t-1} - σ²) ε̂ + σ z (Song et al. 2021, eq. 12, 16).

    Arguments and result as in `ddpm`, and
        eta: between 0 (deterministic, `noise` is never called) and 1 (the variance β̃ of DDPM).

    A number of steps is spaced as for `ddpm`; steps="ddim50" is the integer stride of the paper.

    Raises:
        ValueError: eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    process = diffusion if steps is None else diffusion.respaced(steps)
    variance = eta**2 * process.posterior_variance  # 0 at t = 0: the last step adds no noise
    signal, sigma = np.sqrt(process.alphas_cumprod_prev), np.sqrt(variance)
    direction = np.sqrt(1 - process.alphas_cumprod_prev - variance)

    def move(prediction, x, t, i):
        x = lookup(signal, t, x) * prediction.x0 + lookup(direction, t, x) * prediction.epsilon
        return x + lookup(sigma, t, x) * noise(i) if eta else x

    return _reverse(process, denoiser, x_T, move, clip, return_trajectory)


SAMPLERS: dict[str, Callable] = {"ddpm": ddpm, "ddim": ddim}


def get_sampler(name: str) -> Callable:
    """The sampler of that name.

    Raises:
        ValueError: there is none; the message suggests the nearest.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {tuple(SAMPLERS)}, got {name!r}{suggest(name, SAMPLERS)}")
    return SAMPLERS[name]


def _reverse(
    process: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Array, "b h w c"],
    move: Callable[[Prediction, Array, Array, Array], Array],
    clip: bool,
    return_trajectory: bool,
) -> Samples:
    """Run the process from its last step to its first: x_{t-1} = move(prediction at x_t, x_t, t, i)."""

    def step(x, i):
        t = jnp.full(x.shape[:1], process.length - 1 - i)
        prediction = process.p_mean_variance(denoiser(x, process.denoiser_timesteps(t)), x, t, clip=clip)
        x = move(prediction, x, t, i).astype(x_T.dtype)
        return x, prediction.x0 if return_trajectory else None

    x, trajectory = jax.lax.scan(step, x_T, jnp.arange(process.length))
    return (x, trajectory) if return_trajectory else x
