"""Averages of the parameters: the kinds in use, and a second kind that only this file defines."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.testing import PixelComponents, tiny_settings
from dig_jax.training.ema import ExponentialAverage
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


SETUP = dataclasses.replace(
    TrainSetup.of(PixelComponents(tiny_settings())),
    averages={"mean": PowerAverage(0), "0.5": PowerAverage(3), "fast": ExponentialAverage(0.5)},
)
STEP = jax.jit(functools.partial(train_step, SETUP))


def batch(seed):
    image = np.random.default_rng(seed).standard_normal((8, 4, 4, 1)).astype(np.float32)
    return {"image": image, "label": np.arange(8, dtype=np.int32) % 5}


@pytest.fixture(scope="module")
def history():
    """States after 0, 1, 2, … updates."""
    states = [jax.device_get(init_state(SETUP, SETUP.components.init_params(jax.random.key(0))))]
    for seed in range(4):
        states.append(jax.device_get(STEP(states[-1], batch(seed))[0]))
    return states


def test_averages_of_another_kind_train_through_the_same_step(history):
    params = np.stack([state["params"]["scale"] for state in history[1:]])
    t = np.arange(1, len(history), dtype=float)
    for name, weights in {"mean": t**0, "0.5": power_weights(t, 3)}.items():
        expected = np.tensordot(weights / weights.sum(), params, 1)
        np.testing.assert_allclose(history[-1]["ema"][name]["scale"], expected, rtol=1e-5)
    averages = history[-1]["ema"]
    assert not np.allclose(averages["mean"]["scale"], averages["fast"]["scale"], atol=1e-5)


def power_weights(t, gamma):
    """Weight of each update after the last: Π of later decays times 1 - its own."""
    decay = (1 - 1 / t) ** (gamma + 1)
    return (1 - decay) * np.append(np.cumprod(decay[:0:-1])[::-1], 1)


def test_a_skipped_step_does_not_count_as_an_update(history):
    bad = batch(0) | {"image": np.full((8, 4, 4, 1), np.nan, np.float32)}
    skipped, metrics = jax.device_get(STEP(history[1], bad))
    assert metrics["skipped"] == 1
    after, _ = STEP(skipped, batch(0))
    params = [history[1]["params"]["scale"], after["params"]["scale"]]
    np.testing.assert_allclose(after["ema"]["mean"]["scale"], np.mean(params, axis=0), rtol=1e-5)


def test_averages_of_another_kind_are_saved_and_restored(history, tmp_path):
    settings, device = SETUP.components.config, jax.devices()[0]
    with Checkpoints(tmp_path, settings.checkpoint) as checkpoints:
        checkpoints.save(4, history[-1], {"examples": 32}, settings)
    layout = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)),
        history[-1],
    )
    with Checkpoints(tmp_path, settings.checkpoint) as checkpoints:
        restored, _ = checkpoints.restore(layout)
    jax.tree.map(np.testing.assert_array_equal, restored, history[-1])
