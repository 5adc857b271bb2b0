"""Averages of the parameters: the kinds in use, and a second kind that only this file defines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_components import tiny_settings

from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.components import Components
from dig_jax.training.ema import Average, ExponentialAverage, make_averages
from dig_jax.training.state import init_state
from dig_jax.training.step import train_step
from dig_jax.training.train_setup import TrainSetup


@dataclasses.dataclass(frozen=True)
class PowerAverage:
    """Karras et al. 2024, eq. 1: update t has weight ∝ t^gamma; gamma = 0 is the uniform mean."""

    gamma: float

    def update(self, average, params, updates):
        decay = (1 - 1 / (updates + 1)) ** (self.gamma + 1)
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)


class PixelScale(Components):
    """Components with a network of one parameter per pixel, which compiles in no time."""

    def init_params(self, key):
        return {"scale": jax.random.normal(key, self.image_spec.image_shape)}

    def denoise(self, params, x, t, y, drop=None):
        return jnp.concatenate([params["scale"] * x, jnp.zeros_like(x)], axis=-1)


@pytest.fixture(scope="module")
def setup():
    of_config = TrainSetup.of(PixelScale(tiny_settings(training__ema_decays=(0.5, 0.75))))
    averages = {"mean": PowerAverage(0), "0.5": PowerAverage(3), "fast": ExponentialAverage(0.5)}
    return dataclasses.replace(of_config, averages=averages)


@pytest.fixture(scope="module")
def history(setup):
    """States after 0, 1, 2, … updates."""
    step = jax.jit(functools.partial(train_step, setup))
    states = [init_state(setup, setup.components.init_params(jax.random.key(0)))]
    for seed in range(4):
        image = np.random.default_rng(seed).standard_normal((8, 4, 4, 1)).astype(np.float32)
        states.append(step(states[-1], {"image": image, "label": np.arange(8, dtype=np.int32) % 5})[0])
    return jax.device_get(states)


def test_a_config_asks_for_averages_by_name():
    settings = tiny_settings(training__ema_decays=(0.5, 0.9999)).training
    averages = make_averages(settings)
    assert averages == {"0.5": ExponentialAverage(0.5), "0.9999": ExponentialAverage(0.9999)}
    assert tuple(averages) == settings.average_names
    assert all(isinstance(average, Average) for average in averages.values())


def test_averages_of_another_kind_train_through_the_same_step(history):
    params = np.stack([state["params"]["scale"] for state in history[1:]])
    t = np.arange(1, len(history), dtype=float)
    for name, weights in {"mean": t**0, "0.5": power_weights(t, 3)}.items():
        expected = np.tensordot(weights / weights.sum(), params, 1)
        np.testing.assert_allclose(history[-1]["ema"][name]["scale"], expected, rtol=1e-5)
    assert not np.allclose(
        history[-1]["ema"]["mean"]["scale"], history[-1]["ema"]["fast"]["scale"], atol=1e-5
    )


def power_weights(t, gamma):
    """Weight of each update after the last: Π of later decays times 1 - its own."""
    decay = (1 - 1 / t) ** (gamma + 1)
    return (1 - decay) * np.append(np.cumprod(decay[:0:-1])[::-1], 1)


def test_a_skipped_step_does_not_count_as_an_update(setup, history):
    step = jax.jit(functools.partial(train_step, setup))
    bad = {"image": np.full((8, 4, 4, 1), np.nan, np.float32), "label": np.zeros(8, np.int32)}
    good = {"image": np.ones((8, 4, 4, 1), np.float32), "label": np.zeros(8, np.int32)}
    skipped, _ = step(history[1], bad)
    after, _ = step(skipped, good)
    params = [history[1]["params"]["scale"], after["params"]["scale"]]
    np.testing.assert_allclose(after["ema"]["mean"]["scale"], np.mean(params, axis=0), rtol=1e-5)


def test_averages_of_another_kind_are_saved_and_restored(history, setup, tmp_path):
    settings, device = setup.components.config, jax.devices()[0]
    with Checkpoints(tmp_path, settings.checkpoint) as checkpoints:
        checkpoints.save(4, history[-1], {"examples": 32}, settings)
    layout = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
        history[-1],
    )
    with Checkpoints(tmp_path, settings.checkpoint) as checkpoints:
        restored, _ = checkpoints.restore(layout)
    jax.tree.map(np.testing.assert_array_equal, restored, history[-1])
