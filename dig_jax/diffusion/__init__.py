"""Diffusion processes, guidance and samplers: pure functions of a denoiser."""

from dig_jax.diffusion.gaussian import GaussianDiffusion
from dig_jax.diffusion.guidance import classifier_free
from dig_jax.diffusion.process import Denoiser, Process
from dig_jax.diffusion.samplers import DDIM, DDPM, SAMPLERS, BaseSampler, make_sampler

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "BaseSampler",
    "Denoiser",
    "GaussianDiffusion",
    "Process",
    "classifier_free",
    "make_sampler",
]
