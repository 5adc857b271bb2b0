"""The factor of the noise of flow matching, which training and sampling take from one field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import MEAN, STD, denoiser, noise_of, start

from dig_jax.diffusion import SAMPLERS, FlowMatching, Path, make_sampler
from dig_jax.testing import tiny_components

SCALE = 2.0


def test_the_noise_is_scaled_in_x_t_and_in_the_velocity():
    """JiT: z = (1 - t) x + t s ε and v = (z - x)/t = s ε - x."""
    process = FlowMatching(Path("linear", SCALE))
    x, noise, t = start(0), start(1), jnp.array([0.1, 0.4, 0.7, 1.0])
    at = t[:, None, None, None]
    np.testing.assert_allclose(process.corrupt(x, noise, t), (1 - at) * x + at * SCALE * noise, rtol=1e-6)
    np.testing.assert_allclose(process.targets(x, noise, t), SCALE * noise - x, rtol=1e-5, atol=1e-6)


def test_the_weight_of_jit_does_not_depend_on_the_noise_scale():
    t = jnp.linspace(0, 1, 21)
    for scale in (0.5, SCALE):
        process = FlowMatching(Path("linear", scale), prediction="x", weight="velocity")
        np.testing.assert_allclose(process.weight_at(t), 1 / jnp.maximum(t, 0.05) ** 2, rtol=1e-5)


@pytest.mark.parametrize("path", ["linear", "trigonometric", "vp"])
def test_the_time_of_a_noise_to_signal_ratio_is_inverted_with_a_scale(path):
    t = np.linspace(0.01, 0.99, 9)
    level = Path(path, SCALE).at(t)
    np.testing.assert_allclose(Path(path, SCALE).time_of(level.sigma / level.alpha), t, rtol=1e-8)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("ddpm", "dopri5", "meanflow")])
def test_every_sampler_starts_from_scaled_noise_and_reaches_the_data(name):
    """With the exact denoiser of N(m, s²); without the scale in the sampler, the deviation is another one.

    The last step of Euler-Maruyama, from t = 0.04, adds no noise: the deviation ends 8 % too small.
    """
    process = FlowMatching(Path("linear", SCALE), "x")
    x = jax.random.normal(jax.random.key(0), (4000, 1, 1, 1))
    sampler = make_sampler(name, steps=60)
    images = jax.jit(lambda x: sampler(process, denoiser(process), x, noise_of(x.shape)))(x)
    assert abs(images.mean() - MEAN) < 0.03
    assert abs(images.std() / STD - 1) < (0.1 if name == "euler_maruyama" else 0.06)
    unscaled = FlowMatching("linear", "x")
    wrong = jax.jit(lambda x: sampler(unscaled, denoiser(process), x, noise_of(x.shape)))(x)
    assert abs(wrong.std() / STD - 1) > 0.1


def test_the_config_field_is_a_factor_or_follows_the_image_size():
    flow = {"diffusion__process": "flow", "model__learn_sigma": False}
    assert tiny_components(**flow).diffusion.noise_scale == 1
    assert tiny_components(**flow, diffusion__noise_scale=1.5).diffusion.noise_scale == 1.5
    # Images of 4×4 pixels.
    assert tiny_components(**flow, diffusion__noise_scale=0).diffusion.noise_scale == 4 / 256
    with pytest.raises(ValueError, match="invalid noise_scale: got -1.0"):
        Path("linear", -1.0)
