"""FLOPs of a model's definition."""

import jax
import jax.numpy as jnp
import pytest
from pallas_gla.selective_scan import selective_scan

from configs import dig_xl
from dig_jax import config
from dig_jax.components import Components
from dig_jax.hardware.model_flops import forward_flops, training_flops


def test_model_flops_count_products_in_loops():
    def forward(x, w):
        return jax.checkpoint(lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=3)[0])(x)

    assert forward_flops(forward, jnp.ones((4, 8)), jnp.ones((8, 8))) == 3 * 2 * 4 * 8 * 8


def test_model_flops_count_what_a_selective_scan_adds_to_states_and_reads():
    tokens, maps = jnp.ones((2, 5, 8)), jnp.ones((2, 5, 16))
    rates = -jnp.ones((8, 16))
    assert forward_flops(selective_scan, tokens, tokens, rates, maps, maps, jnp.ones(8)) == 4 * 2 * 5 * 8 * 16


@pytest.mark.parametrize("remat", ["none", "full"])
def test_model_flops_of_xl_equal_its_layers_with_any_remat(remat):
    c = dig_xl.get_config("256", "ours")
    c.data.name, c.model.remat = "fake", remat
    components = Components(config.from_dict(c.to_dict()))
    params = jax.eval_shape(components.init_params, jax.random.key(0))
    image, number = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    width, hidden, tokens = 1152, 3072, 256
    per_token = 2 * width * width // 2 + 3 * width * width + width * 16 + 16 * width // 2 + 3 * width * hidden
    block = tokens * (2 * per_token + 4 * 18 * 32 * 64) + 2 * 6 * width * width
    ends = tokens * 2 * width * (16 + 32) + 2 * (256 * width + width * width + 2 * width * width)
    assert training_flops(components.denoise, params, image, number, number) == 3 * (28 * block + ends)
