"""Distributions of the training time: moments, quantiles, truncation and shift."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dig_jax.diffusion import Times
from dig_jax.diffusion.times import shifted

COUNT = 20_000
DISTRIBUTIONS = {
    "uniform": Times(),
    "logit_normal": Times("logit_normal"),
    "MeanFlow": Times("logit_normal", -0.4, 1.0),
    "JiT": Times("logit_normal", 0.8, 0.8),
    "truncated": Times("logit_normal", high=0.999, low=0.2),
    "truncated uniform": Times(low=0.1, high=0.6),
    "shifted": Times("logit_normal", shift=6.93),
    "shifted uniform": Times(shift=2.0),
}
SHIFTS = st.floats(0.1, 10)


@pytest.fixture(params=DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def times(request):
    return request.param


def base_logits(times, count=400_000):
    """The logit of the base distribution, by rejection: an independent implementation."""
    random = np.random.default_rng(0)
    if times.distribution == "uniform":
        t = random.uniform(size=count)
    else:
        t = 1 / (1 + np.exp(-times.mean - times.std * random.standard_normal(count)))
    t = t[(t >= times.low) & (t <= times.high)]
    return np.log(t / (1 - t)) + math.log(times.shift)  # the shift multiplies t/(1 - t)


def test_drawn_times_have_the_quantiles_of_their_distribution(times):
    drawn = np.sort(jax.device_get(times.sample(jax.random.split(jax.random.key(0), COUNT))))
    assert drawn.dtype == np.float32
    assert 0 <= drawn[0] <= drawn[-1] <= 1
    expected = np.sort(1 / (1 + np.exp(-base_logits(times))))
    for fraction in (0.05, 0.25, 0.5, 0.75, 0.95):
        # The share of draws below the expected quantile: a binomial with 3 standard errors.
        share = np.mean(drawn < np.quantile(expected, fraction))
        assert abs(share - fraction) < 3.5 * math.sqrt(fraction * (1 - fraction) / COUNT)
    assert abs(drawn.mean() - expected.mean()) < 3.5 * expected.std() / math.sqrt(COUNT)


def test_quantiles_increase_and_are_finite_at_the_ends(times):
    t = np.asarray(times.quantile(jnp.linspace(0, 1, 101)))
    assert np.isfinite(t).all()
    assert (np.diff(t) > 0).all()
    np.testing.assert_allclose(t[[0, -1]], shifted(np.array([times.low, times.high]), times.shift), atol=1e-6)


def test_a_time_depends_on_its_key_alone(times):
    keys = jax.random.split(jax.random.key(1), 16)
    np.testing.assert_array_equal(times.sample(keys)[3:5], times.sample(keys[3:5]))


@given(first=SHIFTS, second=SHIFTS, t=st.floats(0, 1))
def test_shifts_compose_by_multiplication_and_keep_the_ends(first, second, t):
    np.testing.assert_allclose(
        shifted(shifted(t, first), second), shifted(t, first * second), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(shifted(shifted(t, first), 1 / first), t, rtol=1e-9, atol=1e-12)
    assert (shifted(0.0, first), shifted(1.0, first)) == (0, pytest.approx(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distribution": "lognormal"}, "unknown times: got 'lognormal'; expected one of uniform, logit_nor"),
        ({"low": 0.6, "high": 0.5}, "invalid time_low, time_high: got 0.6, 0.5; expected 0 ≤ time_low <"),
        ({"std": 0.0}, "invalid time_std: got 0.0; expected a positive number"),
        ({"shift": -1.0}, "invalid time_shift: got -1.0; expected a positive number"),
    ],
)
def test_invalid_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Times(**fields)
