"""Paths: derivatives, signal-to-noise ratio, conversions of predictions, and DDPM's tables."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.diffusion import GaussianDiffusion, Path
from dig_jax.diffusion.path import PATHS, PREDICTIONS, combine, convert

T = np.linspace(0.01, 0.99, 99)
TIMES = st.floats(0.01, 0.99)
NAMES = st.sampled_from(PATHS)
KINDS = st.sampled_from(PREDICTIONS)


@pytest.fixture(params=PATHS)
def path(request):
    return Path(request.param)


def test_derivatives_are_the_slopes_of_the_coefficients(path):
    h = 1e-6
    ahead, behind, level = path.at(T + h), path.at(T - h), path.at(T)
    np.testing.assert_allclose(level.alpha_dot, (ahead.alpha - behind.alpha) / (2 * h), atol=1e-6)
    np.testing.assert_allclose(level.sigma_dot, (ahead.sigma - behind.sigma) / (2 * h), atol=1e-6)


def test_a_path_goes_from_data_to_noise_with_a_falling_signal_to_noise_ratio(path):
    data, noise = path.at(np.array([0.0])), path.at(np.array([1.0]))
    np.testing.assert_array_equal((data.alpha, data.sigma), ([1], [0]))
    np.testing.assert_allclose((noise.alpha, noise.sigma), ([0], [1]), atol=7e-3)
    assert (np.diff(path.at(T).snr) < 0).all()
    assert (path.at(T).omega > 0).all()


def test_the_time_of_a_noise_level_inverts_the_path(path):
    level = path.at(T)
    np.testing.assert_allclose(path.time_of(level.sigma / level.alpha), T, rtol=1e-9)


def test_float32_times_on_a_device_give_the_coefficients_of_float64(path):
    expected, computed = path.at(T), path.at(jnp.asarray(T, jnp.float32))
    for wide, narrow in zip(expected, computed, strict=True):
        assert narrow.dtype == jnp.float32
        np.testing.assert_allclose(narrow, wide, rtol=1e-5, atol=1e-6)


@given(name=NAMES, source=KINDS, target=KINDS, t=TIMES, seed=st.integers(0, 99))
@settings(max_examples=200)
def test_every_prediction_converts_to_every_other_and_back(name, source, target, t, seed):
    level = Path(name).at(np.float64(t))
    x, noise = np.random.default_rng(seed).standard_normal((2, 5))
    x_t = level.alpha * x + level.sigma * noise
    prediction = combine(x, noise, source, level)
    there = convert(prediction, source, target, x_t, level)
    np.testing.assert_allclose(there, combine(x, noise, target, level), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(convert(there, target, source, x_t, level), prediction, rtol=1e-8, atol=1e-8)


def test_predictions_are_defined_at_the_ends_where_the_other_side_is_singular():
    level, x_t = Path().at(np.float64(1)), np.array([0.3])
    np.testing.assert_allclose(convert(np.array([0.5]), "velocity", "x", x_t, level), -0.2)
    np.testing.assert_allclose(convert(np.array([0.5]), "velocity", "noise", x_t, level), 0.3)
    level = Path().at(np.float64(0))
    np.testing.assert_allclose(convert(np.array([0.5]), "velocity", "x", x_t, level), 0.3)


def test_the_velocity_of_the_trigonometric_path_is_half_pi_times_v():
    level = Path("trigonometric").at(T)
    x, noise = np.random.default_rng(0).standard_normal((2, len(T)))
    velocity, v = (combine(x, noise, kind, level) for kind in ("velocity", "v"))
    np.testing.assert_allclose(velocity, np.pi / 2 * v)


def test_the_tables_of_ddpm_are_the_vp_path_at_its_knots():
    # The product of 1 - β_i differs from the exponential of the integral by the sum of β²/2, at most 0.07.
    tables, level = GaussianDiffusion(), Path("vp").at(np.arange(1, 1001) / 1000)
    log_alpha_bar = np.log(tables.alphas_cumprod)
    betas = np.linspace(1e-4, 0.02, 1000)
    second_order = np.cumsum(np.log1p(-betas) + betas)
    np.testing.assert_allclose(log_alpha_bar - second_order, 2 * np.log(level.alpha), atol=6e-3)
    np.testing.assert_allclose(np.sqrt(tables.alphas_cumprod), level.alpha, atol=2.5e-3)


@pytest.mark.parametrize("steps", [1000, 50, "ddim50"])
def test_the_knots_of_ddpm_are_its_tables_with_the_slopes_of_the_vp_path(steps):
    process = GaussianDiffusion()
    times, level = process.knots(steps)
    visited = process.respaced(steps).timestep_map[::-1]
    np.testing.assert_array_equal(times, [*visited, -1])
    np.testing.assert_allclose(level.alpha[:-1], np.sqrt(process.alphas_cumprod[visited]))
    np.testing.assert_allclose(level.sigma[:-1], np.sqrt(1 - process.alphas_cumprod[visited]), rtol=1e-9)
    assert (level.alpha[-1], level.sigma[-1]) == (1, 0)
    exact = Path("vp").at((visited + 1) / 1000)
    inner = visited > 20
    np.testing.assert_allclose(
        1000 * level.alpha_dot[:-1][inner], exact.alpha_dot[inner], rtol=0.02, atol=0.03
    )
    np.testing.assert_allclose(1000 * level.sigma_dot[:-1][inner], exact.sigma_dot[inner], atol=0.03)


@pytest.mark.parametrize(("name", "hint"), [("liner", "did you mean 'linear'"), ("gvp", "trigonometric")])
def test_an_unknown_path_is_named(name, hint):
    with pytest.raises(ValueError, match=f"unknown path: got '{name}'; expected one of linear.*{hint}"):
        Path(name)
