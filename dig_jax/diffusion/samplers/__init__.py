"""Samplers, from noise to images: frozen dataclasses, each of which runs one `lax.scan` over its steps."""

from dig_jax.diffusion.samplers.base import BaseSampler
from dig_jax.diffusion.samplers.ddim import DDIM
from dig_jax.diffusion.samplers.ddpm import DDPM
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
    "EDMHeun",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "UniPC",
    "make_sampler",
]
