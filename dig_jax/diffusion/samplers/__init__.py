"""Samplers, from noise to images: frozen dataclasses. All but Dopri5 run one `lax.scan` over their steps."""

from dig_jax.diffusion.samplers.base import BaseSampler, LoopSampler
from dig_jax.diffusion.samplers.ddim import DDIM
from dig_jax.diffusion.samplers.ddpm import DDPM
from dig_jax.diffusion.samplers.dopri5 import Dopri5
from dig_jax.diffusion.samplers.mean_flow import MeanFlowSampler
from dig_jax.diffusion.samplers.ode import DPMpp2M, Euler, Heun, UniPC
from dig_jax.diffusion.samplers.registry import SAMPLERS, make_sampler
from dig_jax.diffusion.samplers.sde import DPMpp2MSDE, EDMHeun, EulerMaruyama

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "BaseSampler",
    "DPMpp2M",
    "DPMpp2MSDE",
    "Dopri5",
    "EDMHeun",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "LoopSampler",
    "MeanFlowSampler",
    "UniPC",
    "make_sampler",
]
