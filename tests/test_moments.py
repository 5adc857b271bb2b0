import functools
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.evaluation.moments import Gaussian, Moments, distance, frechet_distance

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def features(seed, count, length=6, mean=3.0):
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(length).normal(size=(length, length))
    return (mean + random.normal(size=(count, length)) @ mixing).astype(np.float32)


def merged(parts, length=6):
    return functools.reduce(operator.add, map(Moments.of, parts), Moments.none(length))


def assert_same(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, **CLOSE)
    np.testing.assert_allclose(a.scatter, b.scatter, **CLOSE)


@given(st.permutations(range(60)), st.lists(st.integers(0, 60), max_size=8), st.sampled_from([0, 3, 1e3]))
@settings(max_examples=50)
def test_moments_do_not_depend_on_the_order_of_images_or_how_they_are_split(order, cuts, mean):
    x = features(0, 60, mean=mean)
    parts = np.split(x[np.array(order)], sorted(cuts))
    for pieces in (parts, parts[::-1]):
        assert_same(merged(pieces), Moments.of(x))
    tree = [Moments.of(part) for part in parts]
    while len(tree) > 1:  # merged in pairs, as processes may do
        tree = [functools.reduce(operator.add, tree[i : i + 2]) for i in range(0, len(tree), 2)]
    assert_same(tree[0], Moments.of(x))


def test_moments_are_mean_and_unbiased_covariance():
    x = features(1, 50)
    fitted = Moments.of(x).gaussian
    np.testing.assert_allclose(fitted.mean, x.mean(0, dtype=np.float64), **CLOSE)
    np.testing.assert_allclose(fitted.covariance, np.cov(x.astype(np.float64), rowvar=False), **CLOSE)


def test_a_large_mean_costs_no_digits():
    x = features(2, 40, mean=0).astype(np.float64)
    shifted = Moments.of(x + 1e6).gaussian.covariance
    np.testing.assert_allclose(shifted, Moments.of(x).gaussian.covariance, rtol=1e-7)


def test_moments_are_stored_exactly():
    a = Moments.of(features(3, 7))
    b = Moments.from_arrays(a.arrays())
    assert a.count == b.count
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_array_equal(a.scatter, b.scatter)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_vectors_for_a_covariance_are_an_error(count):
    with pytest.raises(ValueError, match=f"got {count}; expected at least 2"):
        _ = Moments.of(features(0, count)).gaussian


@pytest.mark.parametrize("count", [3, 40, 300])
def test_a_set_has_distance_zero_from_itself(count):
    """Also with fewer images than features, where the covariance is singular."""
    x = features(4, count, length=100)
    assert frechet_distance(x, x) < 1e-6
    assert frechet_distance(x, x[::-1]) < 1e-6


@given(st.floats(0.1, 3), st.floats(-2, 2))
def test_isotropic_gaussians_have_a_closed_form(scale, shift):
    a = Gaussian(np.zeros(5), np.eye(5))
    b = Gaussian(np.full(5, shift), scale**2 * np.eye(5))
    np.testing.assert_allclose(distance(a, b), 5 * shift**2 + 5 * (1 - scale) ** 2, atol=1e-12, rtol=1e-12)


def test_covariances_that_do_not_commute_have_a_closed_form():
    """In two dimensions tr √(AB) = √(tr AB + 2 √det AB)."""
    a, b = np.array([[2, 0.6], [0.6, 1]]), np.array([[1, -0.3], [-0.3, 3]])
    zero = np.zeros(2)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    np.testing.assert_allclose(distance(Gaussian(zero, a), Gaussian(zero, b)), 7 - 2 * root, rtol=1e-12)
    np.testing.assert_allclose(distance(Gaussian(zero, a), Gaussian(zero, b)), 0.9969458840, rtol=1e-9)


def test_finite_samples_bias_the_distance_as_predicted():
    """d/N + d(d+1)/(4N) against the true Gaussian, twice that between two samples; d²/N is small here."""
    length, count, repeats = 16, 4000, 30
    random = np.random.default_rng(0)
    true = Gaussian(np.zeros(length), np.eye(length))
    sets = [Moments.of(random.normal(size=(count, length))).gaussian for _ in range(2 * repeats)]
    bias = length / count + length * (length + 1) / (4 * count)
    pairs = [distance(a, b) for a, b in zip(sets[::2], sets[1::2], strict=True)]
    for values, expected in (([distance(a, true) for a in sets], bias), (pairs, 2 * bias)):
        error = np.std(values, ddof=1) / np.sqrt(len(values))
        assert abs(np.mean(values) - expected) < 3 * error
