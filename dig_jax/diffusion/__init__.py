"""Gaussian diffusion, guidance and samplers: pure functions over a denoiser callable."""

from dig_jax.diffusion.gaussian import Denoiser, GaussianDiffusion
from dig_jax.diffusion.guidance import classifier_free
from dig_jax.diffusion.samplers import SAMPLERS, ddim, ddpm, get_sampler

__all__ = ["SAMPLERS", "Denoiser", "GaussianDiffusion", "classifier_free", "ddim", "ddpm", "get_sampler"]
