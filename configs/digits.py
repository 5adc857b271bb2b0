"""Scikit-learn's handwritten digits: a class-conditional DiG that trains in minutes on a CPU.

The argument is the recipe (recipes.py): "modern", or "meanflow" for digits in one step of the network.
benchmarks/digits.py compares "modern" with the published one.
"""

from configs import base, recipes
from dig_jax.errors import alternatives

_RECIPES = {"modern": recipes.modernize, "meanflow": recipes.use_mean_flow}


def get_config(recipe: str = "modern"):
    if recipe not in _RECIPES:
        raise ValueError(f"invalid recipe {recipe!r}; expected {alternatives([*_RECIPES])}")
    c = _RECIPES[recipe](base.get_config())
    c.model.depth = 4
    c.model.hidden_size = 96
    c.model.num_heads = 2
    if recipe == "modern":
        c.model.internal_head = 1
    c.data.name = "digits"
    c.data.batch_size = 64
    c.training.steps = 2400
    c.training.ema_decays = (0.99,)
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.schedule = "cosine"
    c.checkpoint.every_steps = 500
    c.checkpoint.keep_every_steps = 0
    c.logging.every_steps = 50
    c.logging.heldout_every_steps = 250
    c.sampling.every_steps = 1000
    c.sampling.guidance_scale = 1.0  # with "modern", internal guidance alone: one evaluation per step
    c.sampling.clip = recipe == "modern"
    c.mesh.cpu_devices = 2
    return c
