"""Feature caching: the extrapolation, and its place in sampling."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax import Sampler
from dig_jax.sampling.feature_cache import CachedModel, CacheSpec, extrapolated, updated
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.testing import random_params, tiny_components

FLOW = {"diffusion__process": "flow", "model__learn_sigma": False}
DRAW = {"seeds": [3, 1], "return_latents": True}


def history(values, order):
    """The differences after full evaluations with these features."""
    differences = jnp.zeros((order + 1, 1))
    for value in values:
        differences = updated(differences, jnp.float32([value]))
    return differences


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_features_that_are_a_polynomial_in_the_step_are_extrapolated_exactly(order):
    interval = 4
    polynomial = np.polynomial.Polynomial([0.7, -0.3, 0.05, 0.01][: order + 1])
    full = interval * np.arange(order + 1)
    differences = history(polynomial(full), order)
    for j in range(interval):
        predicted = extrapolated(differences, jnp.float32(j / interval), jnp.int32(order + 1))
        np.testing.assert_allclose(predicted[0], polynomial(full[-1] + j), rtol=1e-5)


def test_a_higher_order_is_nearer_to_an_exponential_where_taylor_series_of_differences_are_not():
    values, expected = [math.exp(0.15 * n) for n in (-16, -12, -8, -4, 0)], math.exp(0.15 * 3)
    errors, taylor = [], []
    for order in (2, 3, 4):
        differences, s = history(values, order), 3 / 4
        errors.append(expected - float(extrapolated(differences, jnp.float32(s), jnp.int32(5))[0]))
        terms = [float(row[0]) * s**i / math.factorial(i) for i, row in enumerate(differences)]
        taylor.append(expected - sum(terms))
    np.testing.assert_allclose(errors, [0.096, 0.041, 0.018], atol=1e-3)
    np.testing.assert_allclose(taylor, [0.173, 0.166, 0.166], atol=1e-3)


def test_the_order_is_limited_by_the_number_of_full_evaluations():
    predicted = extrapolated(history([2.0], 3), jnp.float32(0.5), jnp.int32(1))
    np.testing.assert_array_equal(predicted, [2.0])
    predicted = extrapolated(history([2.0, 3.0], 3), jnp.float32(0.5), jnp.int32(2))
    np.testing.assert_array_equal(predicted, [3.5])


@functools.cache
def sampler():
    options = {"sampling__sampler": "euler", "sampling__steps": 5, "sampling__guidance_scale": 1.0}
    components = tiny_components(**options, **FLOW, sampling__batch_size=2)
    return Sampler(components, jax.tree.map(jnp.asarray, random_params(components)), step=0)


@pytest.mark.parametrize("skip", [None, "linear"])
def test_kept_features_of_the_same_input_give_the_same_outputs(skip):
    sizes = {"model__depth": 12 if skip else 5, "model__skip": skip or "none", "model__internal_head": 2}
    components = tiny_components(**FLOW, **sizes)
    params = random_params(components)
    x, t, y = jnp.ones((2, 4, 4, 1)), jnp.array([100.0, 500.0]), jnp.array([1, 2])
    outputs = jax.jit(functools.partial(components.model_spec.outputs), static_argnames="features")
    kept = outputs(params, x, t, y, features="keep")
    again = jax.jit(components.model_spec.outputs)(params, x, t, y, features=kept.features)
    plain = jax.jit(components.model_spec.outputs)(params, x, t, y)
    assert not any(plain.features)
    for name in ("output", "internal"):
        np.testing.assert_allclose(getattr(again, name), getattr(plain, name), atol=1e-5)
        np.testing.assert_allclose(getattr(kept, name), getattr(plain, name), atol=1e-5)


def test_order_zero_reuses_the_features_of_the_last_full_evaluation():
    components = sampler().components
    evaluate = functools.partial(components.model_spec.outputs, sampler().params)
    model, y = CachedModel(evaluate, CacheSpec(interval=2, order=0)), jnp.array([1, 2])
    random = np.random.default_rng(0)
    xs = jnp.float32(random.standard_normal((3, 2, 4, 4, 1)))
    ts = jnp.float32([[900, 900], [500, 500], [100, 100]])
    predictions = [model(x, t, y)[0] for x, t in zip(xs, ts, strict=True)]
    features = evaluate(xs[0], ts[0], y, features="keep").features
    expected = [evaluate(x, t, y).output for x, t in zip(xs, ts, strict=True)]
    expected[1] = evaluate(xs[1], ts[1], y, features=features).output
    np.testing.assert_allclose(predictions, expected, atol=1e-5)


def test_an_interval_of_one_is_no_cache_and_longer_ones_stay_near():
    plain = sampler()(**DRAW)
    np.testing.assert_array_equal(sampler()(cache_interval=1, cache_order=3, **DRAW), plain)
    cached = sampler()(cache_interval=2, **DRAW)
    assert 1e-6 < np.abs(cached - plain).max() < 0.5 * np.abs(plain).max()


def test_each_branch_of_guidance_has_its_own_history_and_no_image_depends_on_its_batch():
    options = {"cache_interval": 2, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.7)}
    together = sampler()(labels=[1, 2], **options, **DRAW)
    other = sampler()(labels=[1, 4], **options, **DRAW | {"seeds": [3, 8]})
    np.testing.assert_allclose(other[0], together[0], atol=1e-5)
    # A guided network that ignores its class is the plain one, so that both histories are equal to its own.
    params = jax.tree.map(lambda leaf: leaf, sampler().params)
    params = params | {"label_embed": jax.tree.map(np.zeros_like, params["label_embed"])}
    classless = Sampler(sampler().components, params, step=0)
    guided = classless(cache_interval=2, guidance_scale=3.0, **DRAW)
    np.testing.assert_allclose(guided, classless(cache_interval=2, **DRAW), atol=1e-4)


def test_caching_goes_with_momentum():
    options = {"guidance": "apg", "guidance_scale": 2.0}
    plain, cached = sampler()(**options, **DRAW), sampler()(cache_interval=2, **options, **DRAW)
    assert 1e-6 < np.abs(cached - plain).max() < np.abs(plain).max()


@pytest.mark.parametrize("name", ["heun", "edm_heun"])
def test_samplers_with_two_evaluations_per_step_are_refused(name):
    with pytest.raises(ValueError, match=f"unsupported cache_interval=2 with sampler='{name}'; expected 1"):
        GenerationSpec.of(sampler().components, sampler=name, cache_interval=2)
