"""Diffusion Gated Linear Attention Transformers in JAX.

model = dig_jax.create_model("DiG-S/2", input_size=32, num_classes=1000, rngs=nnx.Rngs(0))
sampler = dig_jax.load("runs/digits")
images = sampler(labels=[0, 1, 2], guidance_scale=1.5)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dig_jax import convert, diffusion, evaluation
    from dig_jax.errors import CheckpointError, ConfigError, UserError
    from dig_jax.models import create_model
    from dig_jax.sampling.sampler import Sampler, load

# The module of each public name, imported on first use: `import dig_jax` alone stays fast.
_MODULES = {
    "CheckpointError": "dig_jax.errors",
    "ConfigError": "dig_jax.errors",
    "Sampler": "dig_jax.sampling.sampler",
    "UserError": "dig_jax.errors",
    "create_model": "dig_jax.models",
    "load": "dig_jax.sampling.sampler",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Sampler",
    "UserError",
    "convert",
    "create_model",
    "diffusion",
    "evaluation",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in __all__:
        return importlib.import_module(f"dig_jax.{name}")
    raise AttributeError(f"module 'dig_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
