"""The modules whose `__all__` is the public interface."""

import pallas_gla
import pallas_gla.selective_scan

import dig_jax
import dig_jax.autoencoder
import dig_jax.convert
import dig_jax.diffusion
import dig_jax.evaluation

MODULES = (
    dig_jax,
    dig_jax.autoencoder,
    dig_jax.convert,
    dig_jax.diffusion,
    dig_jax.evaluation,
    pallas_gla,
    pallas_gla.selective_scan,
)
