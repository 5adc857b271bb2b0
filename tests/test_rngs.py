import jax
import numpy as np
from flax import nnx

from dig_jax.rngs import make_rngs


def test_the_keys_are_those_of_flax():
    def keys(rngs):
        return [jax.random.key_data(key) for key in (rngs.params(), rngs(), rngs.params())]

    for key in (7, jax.random.key(3)):
        np.testing.assert_array_equal(keys(make_rngs(key)), keys(nnx.Rngs(key)))


def test_a_traced_model_has_the_initial_parameters_of_flax():
    def linear(make):
        return jax.jit(lambda key: nnx.split(nnx.Linear(3, 4, rngs=make(key)))[1])(jax.random.key(5))

    jax.tree.map(np.testing.assert_array_equal, linear(make_rngs), linear(nnx.Rngs))
