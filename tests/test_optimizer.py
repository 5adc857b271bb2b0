import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dig_jax.testing import tiny_settings
from dig_jax.training.optimizer import make_optimizer, make_schedule, may_overflow

BASE = dataclasses.replace(tiny_settings().optimizer, learning_rate=0.5)


def optimizer_settings(**changes):
    return dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [("constant", 0.5, 0.5), ("cosine", 0.5 * (0.1 + 0.9 * 0.5), 0.05), ("linear", 0.5 * 0.55, 0.05)],
)
def test_the_learning_rate_warms_up_peaks_and_decays(schedule, middle, end):
    rate = make_schedule(
        optimizer_settings(schedule=schedule, warmup_steps=10, final_fraction=0.1), steps=110
    )
    np.testing.assert_allclose(rate(0), 0.05, rtol=1e-6)  # not 0, which would waste the first step
    np.testing.assert_allclose(np.diff([rate(step) for step in range(11)]), 0.045, rtol=1e-4)
    np.testing.assert_allclose([rate(10), rate(60), rate(110)], [0.5, middle, end], rtol=1e-5)
    np.testing.assert_allclose(rate(10_000), end, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_without_warmup_the_first_step_has_the_peak_rate(schedule):
    assert float(make_schedule(optimizer_settings(schedule=schedule), steps=5)(0)) == 0.5


def test_a_warmup_longer_than_the_run_stays_unfinished():
    rate = make_schedule(optimizer_settings(schedule="cosine", warmup_steps=100), steps=10)
    np.testing.assert_allclose(rate(9), 0.5 / 100 + 9 * (0.5 - 0.5 / 100) / 100, rtol=1e-5)


def one_update(settings, gradient, params):
    optimizer = make_optimizer(settings, steps=10)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


def test_the_first_update_follows_the_sign_of_the_gradient_and_decays_the_weight():
    """AdamW's first step in closed form: its two moments, bias-corrected, are g and g²."""
    params, gradient = jnp.array([2.0, -3.0]), jnp.array([1e-2, -7.0])
    new, _ = one_update(optimizer_settings(weight_decay=0.1), gradient, params)
    np.testing.assert_allclose(new, params - 0.5 * (jnp.sign(gradient) + 0.1 * params), rtol=1e-5)


@pytest.mark.parametrize(("norm", "factor"), [(0.0, 1.0), (1.0, 1 / 5), (10.0, 1.0)])
def test_only_gradients_longer_than_clip_norm_are_clipped(norm, factor):
    """The gradient has norm 5; Adam's first moment is (1 - b1)·g."""
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    _, state = one_update(optimizer_settings(clip_norm=norm, b1=0.9), gradient, gradient)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moment["a"], 0.1 * factor * gradient["a"], rtol=1e-5)
    np.testing.assert_allclose(moment["b"], 0.1 * factor * gradient["b"], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"learning_rate": 1e-4, "weight_decay": 0.1, "b2": 0.95}, False),
        ({"learning_rate": 1e30}, True),
        ({"weight_decay": 1e30}, True),
        ({"b1": 0.99, "b2": 0.9}, True),
        ({"b1": 0.0, "b2": 0.0}, True),
    ],
)
def test_only_extreme_settings_may_overflow(changes, expected):
    assert may_overflow(optimizer_settings(**changes)) is expected


@given(
    gradients=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    b1=st.floats(0, 0.95),
    b2=st.floats(0.91, 0.9999),
)
def test_adamw_moves_a_parameter_by_no_more_than_the_bound(gradients, b1, b2):
    """The bound on which `may_overflow` relies, in float64."""
    first = second = 0.0
    for step, gradient in enumerate(gradients, 1):
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
        move = abs(first) / (1 - b1**step) / (np.sqrt(second / (1 - b2**step)) + 1e-8)
        assert move <= (1 + 1e-9) / np.sqrt((1 - b1**2 / b2) * (1 - b2))
