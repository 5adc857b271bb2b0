"""Samplers, from noise to images: frozen dataclasses, each of which runs one `lax.scan` over its steps."""

from dig_jax.diffusion.samplers.base import BaseSampler
from dig_jax.diffusion.samplers.ddim import DDIM
from dig_jax.diffusion.samplers.ddpm import DDPM
from dig_jax.diffusion.samplers.registry import SAMPLERS, make_sampler

__all__ = ["DDIM", "DDPM", "SAMPLERS", "BaseSampler", "make_sampler"]
