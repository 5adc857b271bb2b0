"""MeanFlow: its identity and its objective on Gaussian data, whose flow is known, and its steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import MEAN, STD, denoiser, float64, flow, no_noise, start  # noqa: F401 (a fixture)

from dig_jax.components import Components
from dig_jax.diffusion import MeanFlow, Path, Times, make_sampler
from dig_jax.diffusion.mean_flow import Jumps
from dig_jax.testing import mean_flow_settings, tiny_components
from dig_jax.training.objectives import denoising, mean_flow

LINEAR, TRIGONOMETRIC = MeanFlow(), MeanFlow(Path("trigonometric"))
NULL_MEAN = -0.4
KEYS = jax.random.split(jax.random.key(3), 4000)


def jumps_of(times, lengths, strength=0.0, low=0.0, high=1.0):
    rest = (jnp.full(len(times), jnp.float64(value)) for value in (strength, low, high))
    return Jumps(jnp.asarray(times), jnp.asarray(lengths), *rest)


def wide(x):
    return x[:, None, None, None]


def exact_average_velocity(path, z, jumps, mean=MEAN):
    """The average velocity of the guided flow: guided between `low` and `high`, plain before and after."""
    w = 1 / (1 - jumps.strength)
    guided_mean = NULL_MEAN + w * (mean - NULL_MEAN)
    end = jumps.times - jumps.lengths
    cuts = [jumps.times, *(jnp.clip(cut, end, jumps.times) for cut in (jumps.high, jumps.low)), end]
    x = z
    for t, t_next, m in zip(cuts, cuts[1:], (mean, guided_mean, mean), strict=False):
        x = _flow(path, x, t, t_next, m)
    return (z - x) / wide(jumps.lengths)


def _flow(path, x, t, t_next, mean):
    level, after = path.at(t), path.at(t_next)
    ratio = (after.alpha**2 * STD**2 + after.sigma**2) / (level.alpha**2 * STD**2 + level.sigma**2)
    return wide(after.alpha * mean) + wide(jnp.sqrt(ratio)) * (x - wide(level.alpha * mean))


@pytest.mark.parametrize("process", [LINEAR, TRIGONOMETRIC], ids=lambda process: process.path.name)
def test_the_compound_velocity_of_the_exact_average_velocity_is_the_velocity_of_the_flow(process):
    z = start()
    jumps = jumps_of([0.3, 0.5, 0.8, 0.97], [0.1, 0.4, 0.3, 0.9])
    velocity = denoiser(process)(z, 1000 * jumps.times)
    u = functools.partial(exact_average_velocity, process.path)
    found = mean_flow.compound_velocity(u, z, jumps, velocity)
    np.testing.assert_allclose(found, velocity, atol=1e-10)


@pytest.mark.parametrize("process", [LINEAR, TRIGONOMETRIC], ids=lambda process: process.path.name)
@pytest.mark.parametrize("steps", [1, 3])
def test_any_number_of_steps_with_the_exact_average_velocity_gives_the_image_of_the_flow(process, steps):
    def denoise(z, t):
        return exact_average_velocity(process.path, z, jumps_of(t[:, 0] / 10, t[:, 1]))

    images = make_sampler("meanflow", steps=steps)(process, denoise, start(), no_noise)
    np.testing.assert_allclose(images, flow(process.path, start(), 1, 0), atol=1e-6)


def test_no_gradient_flows_through_the_derivative():
    z, jumps = start(), jumps_of([0.3, 0.5, 0.8, 0.97], [0.1, 0.4, 0.3, 0.9])

    def gradient(coefficients):
        def u(z, jumps):
            a, b = coefficients
            return a * z + b * wide(jumps.lengths * jumps.times)

        return mean_flow.compound_velocity(u, z, jumps, z)

    found = jax.jacfwd(gradient)(jnp.array([0.7, -0.2]))
    expected = jnp.stack([z, jnp.broadcast_to(wide(jumps.lengths * jumps.times), z.shape)], axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-12)


class Exact(Components):
    """The exact guided flow map of Gaussian data with a mean for the class and one for the null class."""

    def denoise(self, params, x, t, y, drop, jump):
        length, *guidance = jnp.moveaxis(jump, -1, 0)
        # The velocity is the limit of short steps.
        jumps = Jumps(t / 10, jnp.maximum(length, 1e-7), *guidance)
        mean = jnp.where(drop, NULL_MEAN, MEAN)
        return params["scale"] * exact_average_velocity(self.diffusion.path, x, jumps, mean)


def test_the_guided_flow_map_is_the_minimum_of_the_objective():
    components = Exact(mean_flow_settings(training__label_dropout=0.3), tiny_components().image_spec)
    count = 4_000
    # The class and the null class are two sets of data here: a dropped label comes with its image.
    indices, key = jnp.arange(count), jax.random.key(5)
    shape = (1, 1, 1)
    drop = denoising.draw(components, key, indices, shape).drop
    image = STD * jax.random.normal(jax.random.key(6), (count, *shape), jnp.float64)
    image += wide(jnp.where(drop, NULL_MEAN, MEAN))
    batch = {"image": image, "label": jnp.zeros(count, jnp.int32), "index": indices}

    def error(scale):
        return mean_flow.errors(components, {"scale": scale}, batch, key)[0].ravel()

    exact = error(1.0)
    assert abs(np.mean(exact)) < 4 * np.std(exact) / count**0.5
    assert np.mean(error(1.2) ** 2) > np.mean(exact**2) < np.mean(error(0.8) ** 2)


def test_steps_of_length_zero_are_flow_matching_bit_for_bit():
    process = MeanFlow(instant_fraction=1.0, guidance_max=1.0)
    with jax.enable_x64(False):
        times, drop = process.sample_times(KEYS[:4]), jnp.zeros(4, bool)
        jumps = process.sample_jumps(KEYS[:4], times, drop)
        z, velocity = start().astype(jnp.float32), start(1).astype(jnp.float32)

        def u(z, jumps):
            return jnp.sin(z) * wide(jnp.cos(jumps.times)) + wide(jumps.lengths)

        found = mean_flow.compound_velocity(u, z, jumps, velocity)
        np.testing.assert_array_equal(found, u(z, jumps.here))
        np.testing.assert_array_equal(jumps.strength, 0)


def test_times_are_ordered_and_the_fraction_of_steps_of_length_zero_is_the_fields():
    process = MeanFlow(times=Times("logit_normal", -0.4), instant_fraction=0.25)
    jumps = process.sample_jumps(KEYS, process.sample_times(KEYS), jnp.zeros(len(KEYS), bool))
    assert (jumps.lengths >= 0).all() and (jumps.times >= jumps.lengths).all()
    instant = np.asarray(jumps.lengths == 0)
    assert abs(instant.mean() - 0.25) < 0.03
    np.testing.assert_array_equal(jumps.low[instant], 0)
    assert (jumps.low < jumps.high).all()


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_scale_of_guidance_has_the_density_of_the_power_law(power):
    process = MeanFlow(guidance_max=8.0, guidance_power=power)
    jumps = process.sample_jumps(KEYS, process.sample_times(KEYS), jnp.zeros(len(KEYS), bool))
    w = np.sort(1 / (1 - np.asarray(jumps.strength, np.float64)))

    def integral(w):
        return np.log(w) if power == 1 else (w ** (1 - power) - 1) / (1 - power)

    distance = np.abs(integral(w) / integral(8.0) - (np.arange(len(w)) + 0.5) / len(w)).max()
    assert distance < 1.95 / len(w) ** 0.5  # Kolmogorov-Smirnov, probability 0.001


def test_velocities_are_taken_at_the_guidance_that_training_has_for_steps_of_length_zero():
    jumps = jumps_of([0.2, 0.7, 0.9], [0.1, 0.7, 0.3], 0.5, 0.3, 0.7)
    np.testing.assert_array_equal(jumps.here.inputs, [[0, 0, 0, 1], [0, 0.5, 0, 1], [0, 0, 0, 1]])


def test_a_dropped_label_is_not_guided():
    process = MeanFlow()
    jumps = process.sample_jumps(KEYS[:6], process.sample_times(KEYS[:6]), jnp.arange(6) < 3)
    np.testing.assert_array_equal(jumps.inputs[:3, 1:], [[0, 0, 1]] * 3)
    assert (jumps.strength[3:] > 0).all()


def test_predictions_of_images_give_the_average_velocity_with_a_limited_divisor():
    process, z, image = MeanFlow(prediction="x"), start(), start(1)
    t = jnp.array([0.01, 0.05, 0.5, 1.0])
    found = process.average_velocity(image, z, t)
    np.testing.assert_allclose(found, (z - image) / wide(jnp.maximum(t, 0.05)), rtol=1e-12)


@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_other_samplers_follow_the_flow_of_image_predictions_to_its_end(sampler, path):
    process = MeanFlow(path, prediction="x")

    def denoise(z, timesteps):
        """The minimum of the objective: the prediction whose velocity, with the limited divisor, is exact."""
        level = process.level(timesteps / 10, z)
        velocity = denoiser(MeanFlow(path))(z, 100 * timesteps)
        return (level.sigma_dot * z - jnp.maximum(level.sigma, 0.05) * velocity) / level.omega

    images = make_sampler(sampler, steps=100)(process, denoise, start(), no_noise)
    np.testing.assert_allclose(images, flow(process.path, start(), 1, 0), atol=4e-3)
    t, noise = jnp.array([0.01, 0.05, 0.5, 1.0]), start(1)
    exact = process.average_velocity(noise, start(), t)
    given = {"x0": start(2), "noise": noise, "x_t": start(), "times": t}
    error = MeanFlow(path).loss(exact, **given)["loss"]
    np.testing.assert_allclose(process.loss(noise, **given)["loss"], error, rtol=1e-12)
