"""Random keys for the initialization of models."""

import jax
import numpy as np
from flax import nnx


class _Stream(nnx.RngStream):
    """A stream with the keys of `nnx.RngStream`, whose counter is a Python number.

    After every key, Flax asks for the sharding of the counter. A traced counter has none, so that JAX
    composes an error message from the program traced so far. That takes a sixth of the time to trace DiG-S/2,
    and two thirds for the autoencoder, whose layers are not scanned.
    """

    def __init__(self, key: jax.Array | int):
        super().__init__(key, tag="default")
        self._number = 0

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], np.uint32(self._number))
        self._number += 1
        return key


def make_rngs(key: jax.Array | int) -> nnx.Rngs:
    """Return `nnx.Rngs(key)` with the same keys in less time; transformations of Flax cannot take it."""
    rngs = nnx.Rngs()
    setattr(rngs, "default", _Stream(key))  # noqa: B010 (unknown to pyright)
    return rngs
