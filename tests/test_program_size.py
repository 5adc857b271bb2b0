import functools

import jax
import jax.numpy as jnp
import pytest

from configs import dig_xl
from dig_jax import config
from dig_jax.components import Components, param_count
from dig_jax.testing import tiny_settings
from dig_jax.training.state import fresh_state
from dig_jax.training.step import train_step
from dig_jax.training.train_setup import TrainSetup


def lowered_step(settings):
    """(abstract state, lowered train step): nothing is allocated."""
    components = Components(settings)
    state = jax.eval_shape(lambda: fresh_state(components))
    size = settings.data.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *components.train_source.image_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    return state, jax.jit(functools.partial(train_step, TrainSetup.of(components))).lower(state, batch)


@pytest.mark.parametrize("name", ["DiG-S/2", "DiT-S/2"])
def test_the_program_does_not_grow_with_the_depth(name):
    """From 8 to 28 blocks by at most a fifth; the width, here small, does not change its length."""
    length = {}
    for depth in (8, 28):
        _, lowered = lowered_step(tiny_settings(model__name=name, model__depth=depth))
        length[depth] = len(lowered.as_text())
    assert length[28] <= 1.2 * length[8]


def test_the_largest_model_lowers_without_memory_for_its_parameters():
    """DiG-XL/2 at 256 pixels, whose state would take 10 GB."""
    c = dig_xl.get_config("256", "ours")
    c.data.name, c.data.batch_size = "fake", 4
    before = sum(array.nbytes for array in jax.live_arrays())
    state, lowered = lowered_step(config.from_dict(c.to_dict()))
    assert param_count(state["params"]) == 675_659_040
    assert "4x32x32x4xf32" in lowered.as_text()
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20
