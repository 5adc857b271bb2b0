"""Stochastic depth: what is dropped, for which images, and that only training drops anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_options import unoptimized
from test_taps import GRID, WIDTH, randomized, stack

from dig_jax import create_model
from dig_jax.errors import ConfigError
from dig_jax.testing import random_params, tiny_components
from dig_jax.training.objectives.denoising import Draw, draw, losses

SMALL = {"hidden_size": 16, "num_heads": 1, "in_channels": 1, "learn_sigma": False}
KEY = jax.random.key(3)


@pytest.fixture(scope="module", autouse=True)
def cheap_programs():
    with unoptimized():
        yield


@pytest.mark.parametrize(("depth", "skip"), [(5, None), (10, "linear")])
def test_each_block_of_a_stack_gets_its_own_factors(depth, skip):
    """With a remainder, and with every kind of segment of long skips."""
    module = randomized(stack(depth, skip=skip))
    x, c = jax.random.normal(KEY, (2, 6, WIDTH)), jnp.ones((2, WIDTH))
    kept = jnp.float32(np.random.default_rng(0).integers(0, 3, (depth, 2)))

    def by_loop(kept):
        def layer(module, index):
            graphdef, params = nnx.split(module)
            return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], params))

        outputs = [x]
        for index in range(depth):
            y = outputs[-1]
            if module.skips is not None and index > depth // 2:
                join = layer(module.skips, index - depth // 2 - 1)
                y = join(jnp.concatenate([y, outputs[depth - index]], axis=-1))
            number, position = divmod(index, module.period)
            is_rest = number == depth // module.period
            block = module.rest[position] if is_rest else layer(module.groups[position], number)
            outputs.append(block.run(y, c, GRID, None, kept[index])[0])
        return outputs[-1]

    run = jax.jit(lambda kept: module.run(x, c, GRID, (), kept=kept).output)
    np.testing.assert_allclose(run(kept), by_loop(kept), atol=1e-5, rtol=1e-5)
    assert np.abs(run(kept) - run(jnp.ones_like(kept))).max() > 1e-2


@functools.cache
def outputs_of(name, depth):
    model = create_model(name, input_size=4, num_classes=3, rngs=nnx.Rngs(0), depth=depth, **options_of(name))
    graphdef, params = nnx.split(model)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(0.3 * random.standard_normal(leaf.shape)), params)
    x, y = jnp.float32(random.standard_normal((2, 4, 4, 1))), jnp.int32([0, 2])

    @jax.jit
    def outputs(kept):
        model = nnx.merge(graphdef, params)
        return model.outputs(x, jnp.float32([5, 700]), y, kept=kept).output

    return outputs, len(model.options.drop_rates)


def options_of(name):
    return {k: v for k, v in SMALL.items() if name != "DiS-S/2" or k != "num_heads"}


@pytest.mark.parametrize(("name", "depth"), [("U-DiG-S", 6), ("DiS-S/2", 4)])
def test_a_factor_changes_its_image_alone_whatever_the_block(name, depth):
    outputs, blocks = outputs_of(name, depth)
    ones = jnp.ones((blocks, 2))
    plain = outputs(ones)
    np.testing.assert_allclose(plain, outputs(None), atol=1e-5)
    for block in range(blocks):
        dropped = outputs(ones.at[block, 1].set(0))
        np.testing.assert_array_equal(dropped[0], plain[0])
        assert np.abs(dropped[1] - plain[1]).max() > 1e-4, block


@functools.cache
def components(rate):
    return tiny_components(
        model__name="DiT-S/2", model__depth=3, model__hidden_size=16, model__drop_path=rate
    )


def test_blocks_are_dropped_at_rates_that_grow_with_the_depth():
    kept = np.asarray(draw(components(0.4), KEY, jnp.arange(3000)).kept)
    for rate, factors in zip((0, 0.2, 0.4), kept, strict=True):
        np.testing.assert_allclose(np.unique(factors), [1] if rate == 0 else [0, 1 / (1 - rate)], rtol=1e-6)
        assert abs(np.mean(factors) - 1) < 4 * np.sqrt(rate / (1 - rate) / 3000) + 1e-6


def test_what_an_image_drops_depends_on_its_key_alone():
    drawn = draw(components(0.4), KEY, jnp.arange(8))
    two = draw(components(0.4), KEY, jnp.array([5, 2]))
    np.testing.assert_array_equal(two.kept, np.asarray(drawn.kept)[:, [5, 2]])
    plain = draw(components(0.0), KEY, jnp.arange(8))
    assert plain.kept is None
    for name in ("times", "noise", "drop"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(drawn, name))


def test_only_training_drops_blocks():
    params = random_params(components(0.0))
    batch = {"image": jnp.ones((8, 4, 4, 1)), "label": jnp.zeros(8, jnp.int32)}
    drawn = draw(components(0.4), KEY, jnp.arange(8))

    def loss(rate, drawn):
        return jax.jit(lambda: losses(components(rate), params, batch, drawn))()

    plain = loss(0.0, drawn._replace(kept=None))
    np.testing.assert_array_equal(loss(0.4, Draw(drawn.times, drawn.noise, drawn.drop)), plain)
    assert (loss(0.4, drawn) != plain).all()


def test_rates_are_below_one():
    with pytest.raises(ConfigError, match="invalid config.model.drop_path=1.0; expected a number from 0 to"):
        components(1.0)
