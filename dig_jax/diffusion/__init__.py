"""Diffusion processes, guidance and samplers: pure functions of a denoiser."""

from dig_jax.diffusion.flow_matching import FlowMatching
from dig_jax.diffusion.gaussian import GaussianDiffusion
from dig_jax.diffusion.guidance import Guidance, classifier_free, make_rule
from dig_jax.diffusion.mean_flow import MeanFlow
from dig_jax.diffusion.path import Path
from dig_jax.diffusion.process import Denoiser, Process
from dig_jax.diffusion.samplers import DDIM, DDPM, SAMPLERS, BaseSampler, make_sampler
from dig_jax.diffusion.times import Times

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "BaseSampler",
    "Denoiser",
    "FlowMatching",
    "GaussianDiffusion",
    "Guidance",
    "MeanFlow",
    "Path",
    "Process",
    "Times",
    "classifier_free",
    "make_rule",
    "make_sampler",
]
