"""Diffusion Gated Linear Attention Transformers in JAX.

model = dig_jax.create_model("DiG-S/2", input_size=32, num_classes=1000, rngs=nnx.Rngs(0))
sampler = dig_jax.load("runs/digits")
images = sampler(labels=[0, 1, 2], guidance_scale=1.5)
"""

from dig_jax import convert, diffusion
from dig_jax.errors import CheckpointError, ConfigError, UserError
from dig_jax.models import create_model
from dig_jax.sampling.sampler import Sampler, load

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Sampler",
    "UserError",
    "convert",
    "create_model",
    "diffusion",
    "load",
]
