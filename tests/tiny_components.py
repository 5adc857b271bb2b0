"""Small components that compile within seconds."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import smoke
from dig_jax import config
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.components import Components, ModelSpec
from dig_jax.diffusion import GaussianDiffusion
from dig_jax.parallel import make_mesh
from dig_jax.training.state import init_params


def tiny_settings(**changes):
    """configs/smoke.py with one block on 4×4 gray images; `model__depth=2` sets config.model.depth."""
    c = smoke.get_config()
    c.model.depth, c.model.hidden_size = 1, 32
    c.data.batch_size = 8
    c.data.options = {"image_size": 4, "channels": 1, "num_classes": 5, "length": 60}
    c.logging.tensorboard = False
    for name, value in changes.items():
        group, field = name.split("__")
        c[group][field] = value
    return config.from_dict(c.to_dict())


def tiny_components(**changes):
    return Components(tiny_settings(**changes))


def mesh_of(data, fsdp=1):
    return make_mesh(tiny_settings(mesh__data=data, mesh__fsdp=fsdp).mesh, batch_size=8)


def random_params(components, seed=0):
    """Random values for all parameters, so that parameters that start at zero affect the output too."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init_params, components))
    return jax.tree.map(lambda leaf: np.float32(0.1 * random.standard_normal(leaf.shape)), shapes)


@dataclasses.dataclass(frozen=True)
class PlainModel(ModelSpec):
    """The exact denoiser of simple images, in place of a network, which takes long to compile.

    The images are standard normal noise around a brightness of label / num_classes; the null class has
    brightness 1.
    """

    process: GaussianDiffusion

    def denoise(self, params, x, t, y, drop=None):
        alpha = jnp.float32(self.process.alphas_cumprod)[t][:, None, None, None]
        brightness = y[:, None, None, None] / self.num_classes
        noise = jnp.sqrt(1 - alpha) * (x - jnp.sqrt(alpha) * brightness)
        return jnp.concatenate([noise, jnp.zeros_like(x)], axis=-1)


class PlainComponents(Components):
    """Components whose network is a `PlainModel`."""

    @property
    def model_spec(self):
        spec = self.image_spec
        return PlainModel(self.config.model, spec.image_shape, spec.num_classes, self.diffusion)


class PixelComponents(Components):
    """Components whose network scales each pixel: it compiles fast and depends on every input."""

    def init_params(self, key):
        return {"scale": jax.random.normal(key, self.image_spec.image_shape)}

    def denoise(self, params, x, t, y, drop=None):
        label = y if drop is None else jnp.where(drop, self.image_spec.num_classes, y)
        noise = params["scale"] * x * (1 + t / 1000)[:, None, None, None] + 0.1 * label[:, None, None, None]
        return jnp.concatenate([noise, 0.5 * x], axis=-1) if self.config.model.learn_sigma else noise


def write_checkpoint(workdir, settings, step=7, image_spec=None):
    """Write a workdir whose averages and parameters all differ; return {name: parameters}."""
    components = Components(settings, image_spec)
    names = ["params", *settings.training.average_names]
    trees = {name: random_params(components, seed) for seed, name in enumerate(names)}
    state = {
        "step": jnp.int32(step),
        "params": trees["params"],
        "ema": {name: trees[name] for name in names[1:]},
    }
    with contextlib.closing(Checkpoints(workdir, settings.checkpoint)) as checkpoints:
        checkpoints.save(step, state, {"examples": 0, **components.image_spec.to_dict()}, settings)
    return trees
