"""Half-lives, power-function averages, and averages that are made after training."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.power_function import Profile, combination, exponent
from dig_jax.checkpoints.reader import read_checkpoint
from dig_jax.config import from_dict, to_dict
from dig_jax.config.averages import average_of_length, length_of
from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.testing import PixelComponents, tiny_settings
from dig_jax.training.ema import (
    Average,
    ExponentialAverage,
    HalfLifeAverage,
    PowerFunctionAverage,
    make_averages,
)
from dig_jax.training.state import init_state
from dig_jax.training.train_setup import TrainSetup

LENGTHS = (0.05, 0.1)


def averaged(average, values, start=0.0):
    """Return the average after each of these values of one parameter."""
    history, step = [jnp.float32(start)], jax.jit(average.update)
    for number, value in enumerate(values):
        history.append(step(history[-1], jnp.float32(value), jnp.int32(number)))
    return np.array(history[1:], np.float64)


def test_a_config_names_averages_of_three_kinds():
    config = tiny_settings(
        training__ema_decays=(0.99,), training__ema_half_lives=(500_000,), training__ema_lengths=LENGTHS
    )
    assert make_averages(config) == {
        "0.99": ExponentialAverage(0.99),
        "half-life-500000": HalfLifeAverage(500_000, 0.05, config.data.batch_size),
        "length-0.05": PowerFunctionAverage(0.05),
        "length-0.1": PowerFunctionAverage(0.1),
    }
    assert tuple(make_averages(config)) == config.training.average_names
    assert all(isinstance(average, Average) for average in make_averages(config).values())
    assert from_dict(to_dict(config)) == config


def test_the_weight_of_an_image_halves_in_a_half_life():
    average = HalfLifeAverage(half_life=320, rampup=None, batch_size=32)
    history = averaged(average, np.zeros(30), start=1.0)
    np.testing.assert_allclose(history, 0.5 ** (np.arange(1, 31) * 32 / 320), rtol=1e-5)


def test_a_ramp_up_shortens_the_half_life_to_a_fraction_of_the_images_seen():
    average = HalfLifeAverage(half_life=640, rampup=0.5, batch_size=32)
    values = np.random.default_rng(0).standard_normal(80)
    expected = start = 123.0  # the initial parameters have no weight
    for number, value in enumerate(values):
        half_life = min(640, 0.5 * 32 * number)
        decay = 0.5 ** (32 / half_life) if half_life else 0
        expected = decay * expected + (1 - decay) * value
    assert averaged(average, values, start)[-1] == pytest.approx(expected, rel=1e-5)


def test_a_ramp_up_counts_the_images_of_steps_with_another_batch_size():
    """Ten steps with batches of 32, then 70 with batches of 128."""
    values = np.random.default_rng(0).standard_normal(80)
    expected, images = 0.0, 0
    for number, value in enumerate(values):
        size = 32 if number < 10 else 128
        decay = 0.5 ** (size / (0.5 * images)) if images else 0
        expected, images = decay * expected + (1 - decay) * value, images + size
    before = HalfLifeAverage(10**6, rampup=0.5, batch_size=32)
    after = HalfLifeAverage(10**6, rampup=0.5, batch_size=128, images_offset=10 * (32 - 128))
    history = jnp.float32(0)
    for number, value in enumerate(values):
        average = before if number < 10 else after
        history = average.update(history, jnp.float32(value), jnp.int32(number))
    assert float(history) == pytest.approx(expected, rel=1e-5)


def test_skipped_steps_before_the_batch_size_grew_do_not_lengthen_the_half_life_below_zero():
    """Nine of ten steps were skipped; an average that grows would be off by orders of magnitude."""
    average = HalfLifeAverage(10**6, rampup=0.5, batch_size=128, images_offset=10 * (32 - 128))
    assert average.update(jnp.float32(5), jnp.float32(1), jnp.int32(1)) == 1


def test_a_long_half_life_is_as_exact_as_a_short_one():
    """1 - decay is 1.4e-6 here: computed from a float32 decay, it would be off by 4 %."""
    average = HalfLifeAverage(half_life=500_000, rampup=None, batch_size=1)
    moved = average.update(jnp.float32(0), jnp.float32(1), jnp.int32(0))
    assert float(moved) == pytest.approx(-np.expm1(-np.log(2) / 500_000), rel=1e-5)


@given(st.floats(0.005, 0.28))
def test_the_exponent_gives_the_profile_its_length(length):
    gamma = exponent(length)
    assert gamma >= 0
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(length**2, rel=1e-9)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_a_power_function_average_has_the_profile_of_its_length(length):
    """After t updates the weight of update τ is about p(τ), the mean of the profile between τ - 1 and τ."""
    updates, gamma = 400, exponent(length)
    values = np.sin(np.arange(1, updates + 1) / 50)
    ends = (np.arange(updates + 1) / updates) ** (gamma + 1)
    expected = np.diff(ends) @ values
    assert averaged(PowerFunctionAverage(length), values, start=99.0)[-1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("a", "b"), [((300, 0.1), (200, 0.05)), ((50, 0.2), (50, 0.05))])
def test_the_product_of_profiles_is_their_integral(a, b):
    from dig_jax.checkpoints.power_function import _product

    def profile(tau, updates, length):
        gamma = exponent(length)
        return (gamma + 1) * tau**gamma / updates ** (gamma + 1)

    integral = quad(lambda tau: profile(tau, *a) * profile(tau, *b), 0, min(a[0], b[0]), epsabs=1e-13)[0]
    assert _product(Profile(*a), Profile(*b)) == pytest.approx(integral, rel=1e-8)
    assert _product(Profile(*b), Profile(*a)) == pytest.approx(integral, rel=1e-8)


SNAPSHOTS = [Profile(updates, length) for updates in range(256, 4097, 256) for length in LENGTHS]


@pytest.mark.parametrize("wanted", SNAPSHOTS[::5])
def test_a_stored_profile_is_reconstructed_exactly(wanted):
    weights, error = combination(SNAPSHOTS, wanted)
    own = [profile == wanted for profile in SNAPSHOTS]
    np.testing.assert_allclose(weights, own, atol=1e-6)
    assert error < 1e-6


@settings(max_examples=20)
@given(st.floats(0.04, 0.2))
def test_a_combination_is_within_the_error_that_it_states(length):
    """By Cauchy-Schwarz the averages of any θ differ by at most error · |p| · |θ|, with norms over time."""
    wanted = Profile(4096, length)
    weights, error = combination(SNAPSHOTS, wanted)
    tau = np.arange(1, 4097)
    theta = np.sin(tau / 300) + 0.5 * np.cos(tau / 90)

    def average(profile):
        ends = np.minimum(np.arange(4097) / profile.updates, 1) ** (exponent(profile.length) + 1)
        return np.diff(ends) @ theta

    gamma = exponent(length)
    norm = (gamma + 1) / np.sqrt((2 * gamma + 1) * 4096)
    bound = error * norm * np.linalg.norm(theta)
    combined = weights @ [average(profile) for profile in SNAPSHOTS]
    assert abs(combined - average(wanted)) <= bound + 1e-5
    assert error < 0.05


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, averages by name): a run with 12 checkpoints, and the averages that training would give."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_settings(training__ema_decays=(), training__ema_lengths=LENGTHS, checkpoint__keep=20)
    setup = TrainSetup.of(PixelComponents(config))
    every = {**setup.averages, "length-0.08": PowerFunctionAverage(0.08)}
    params = setup.components.init_params(jax.random.key(0))
    state = init_state(dataclasses.replace(setup, averages=every), params)

    @jax.jit
    def updated(state, number):
        params = jax.tree.map(lambda x: x + 0.01 * jnp.sin(number / 20), state["params"])
        ema = {name: kind.update(state["ema"][name], params, number) for name, kind in every.items()}
        return state | {"params": params, "ema": ema, "step": number + 1}

    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        for number in range(240):
            state = updated(state, jnp.int32(number))
            if (number + 1) % 20 == 0:
                kept = {name: x for name, x in state["ema"].items() if name in setup.averages}
                checkpoints.save(number + 1, state | {"ema": kept}, {}, config)
    return workdir, jax.device_get(state["ema"])


def test_an_average_that_was_not_kept_comes_from_all_checkpoints(run, caplog):
    workdir, averages = run
    with caplog.at_level(logging.INFO):
        _, step, params = read_checkpoint(workdir, "length-0.08")
    assert step == 240
    assert "length-0.08 combines 24 averages of 12 checkpoints; the error of its profile is" in caplog.text
    expected, other = averages["length-0.08"], averages["length-0.1"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3), params, expected)
    apart = jax.tree.map(lambda x, y: np.abs(x / y - 1).min() > 5e-3, expected, other)
    assert all(jax.tree.leaves(apart))


def test_an_average_of_an_older_checkpoint_takes_none_of_the_newer_ones(run, caplog):
    with caplog.at_level(logging.INFO):
        _, step, _ = read_checkpoint(run[0] / "checkpoints" / "100", "length-0.08")
    assert step == 100 and "combines 10 averages of 5 checkpoints" in caplog.text


@pytest.mark.parametrize("name", ["length-0.3", "length-", "length-x", "0.9"])
def test_other_names_are_refused_with_what_there_is(run, name):
    with pytest.raises(CheckpointError, match=r"expected length-0.05, length-0.1 or params, or length-…"):
        read_checkpoint(run[0], name)


def test_a_config_may_sample_any_length_if_it_keeps_two():
    fields = to_dict(tiny_settings(training__ema_lengths=LENGTHS, sampling__ema="length-0.2"))
    assert from_dict(fields).sampled_ema == "length-0.2"
    with pytest.raises(ConfigError, match="sampling.ema='length-0.2'; expected 0.9"):
        tiny_settings(sampling__ema="length-0.2")


@given(st.floats(0.001, 0.28))
def test_a_name_gives_its_length_back(length):
    assert length_of(average_of_length(length)) == length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__ema_half_lives": (0,)}, r"ema_half_lives=\(0,\); expected distinct numbers of images"),
        ({"training__ema_lengths": (0.3,)}, r"ema_lengths=\(0.3,\); expected distinct numbers between 0 and"),
        ({"training__ema_lengths": (0.1, 0.1)}, r"ema_lengths=\(0.1, 0.1\); expected distinct"),
        ({"training__ema_decays": ()}, r"ema_decays=\(\); expected one or more distinct"),
    ],
)
def test_invalid_averages_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_settings(**changes)
