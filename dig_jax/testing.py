"""A tiny experiment for tests: it exercises every part and compiles within seconds.

settings = tiny_settings(training__steps=4, checkpoint__every_steps=2)
train(settings, workdir)
"""

import contextlib
import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.components import Components, ModelSpec, Params
from dig_jax.config import Config, from_dict, to_dict
from dig_jax.data import ImageSpec
from dig_jax.diffusion import GaussianDiffusion
from dig_jax.parallel import make_mesh
from dig_jax.training.state import init_params

_TINY = {
    "model": {"depth": 1, "hidden_size": 32, "num_heads": 1},
    "data": {
        "name": "fake",
        "batch_size": 8,
        "options": {"image_size": 4, "channels": 1, "num_classes": 5, "length": 60},
    },
    "training": {"steps": 20, "ema_decays": (0.9, 0.99)},
    "optimizer": {"learning_rate": 1e-3},
    "checkpoint": {"every_steps": 10, "keep_every_steps": 0},
    "logging": {"every_steps": 5, "heldout_every_steps": 10, "tensorboard": False},
    "sampling": {"every_steps": 10, "images_per_class": 2, "steps": 5},
}


def tiny_settings(**changes: Any) -> Config:
    """Return the config of one block on 4×4 gray images of 5 classes.

    Args:
        changes: fields to replace, in the form of the command line; `model__depth=2` sets config.model.depth.
    """
    fields = to_dict(Config())
    for group, values in copy.deepcopy(_TINY).items():
        fields[group].update(values)
    for name, value in changes.items():
        group, field = name.split("__")
        fields[group][field] = value
    return from_dict(fields)


def mean_flow_settings(**changes: Any) -> Config:
    """Return `tiny_settings` of a MeanFlow model that samples in one step."""
    needed = {"diffusion__process": "meanflow", "model__flow_map": True, "model__learn_sigma": False}
    sampling = {"sampling__sampler": "meanflow", "sampling__steps": 1}
    return tiny_settings(**{**needed, **sampling, **changes})


def tiny_components(**changes: Any) -> Components:
    """Return the components of `tiny_settings`."""
    return Components(tiny_settings(**changes))


def mesh_of(data: int, fsdp: int = 1) -> jax.sharding.Mesh:
    """Return a mesh with this many devices along the axes data and fsdp."""
    return make_mesh(tiny_settings(mesh__data=data, mesh__fsdp=fsdp).mesh, batch_size=8)


def random_params(components: Components, seed: int = 0) -> Params:
    """Return random values for all parameters, so that those that start at zero affect the output too."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init_params, components))
    return jax.tree.map(lambda leaf: np.float32(0.1 * random.standard_normal(leaf.shape)), shapes)


def write_checkpoint(
    workdir: Path, settings: Config, step: int = 7, image_spec: ImageSpec | None = None
) -> dict[str, Params]:
    """Write a checkpoint whose parameters and averages all differ; return them by name."""
    components = Components(settings, image_spec)
    names = ["params", *settings.training.average_names]
    trees = {name: random_params(components, seed) for seed, name in enumerate(names)}
    state = {
        "step": jnp.int32(step),
        "params": trees["params"],
        "ema": {name: trees[name] for name in names[1:]},
    }
    data = {"examples": step * settings.data.batch_size, **components.image_spec.to_dict()}
    with contextlib.closing(Checkpoints(workdir, settings.checkpoint)) as checkpoints:
        checkpoints.save(step, state, data, settings)
    return trees


@dataclasses.dataclass(frozen=True)
class PlainModel(ModelSpec):
    """The exact denoiser of simple images, in place of a network, which takes long to compile.

    The images are standard normal noise around a brightness of label / num_classes; the null class has
    brightness 1.
    """

    process: GaussianDiffusion

    def denoise(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        y: Num[Array, " b"] | None,
        drop: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """Return the exact noise."""
        assert y is not None
        alpha = jnp.float32(self.process.alphas_cumprod)[t][:, None, None, None]
        brightness = y[:, None, None, None] / self.num_classes
        noise = jnp.sqrt(1 - alpha) * (x - jnp.sqrt(alpha) * brightness)
        return jnp.concatenate([noise, jnp.zeros_like(x)], axis=-1)


class PlainComponents(Components):
    """Components whose network is a `PlainModel`."""

    @functools.cached_property
    def model_spec(self) -> PlainModel:
        """The exact denoiser, for images of `image_spec`."""
        spec = self.image_spec
        assert isinstance(self.diffusion, GaussianDiffusion)
        return PlainModel(self.config.model, spec.image_shape, spec.num_classes, self.diffusion)


class PixelComponents(Components):
    """Components whose network scales each pixel: it compiles fast and depends on every input."""

    def init_params(self, key: Array) -> Params:
        """Return one random scale per pixel."""
        return {"scale": jax.random.normal(key, self.image_spec.image_shape)}

    def denoise(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        y: Num[Array, " b"] | None,
        drop: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """Return scaled pixels, shifted by timestep and label."""
        assert y is not None
        label = y if drop is None else jnp.where(drop, self.image_spec.num_classes, y)
        noise = params["scale"] * x * (1 + t / 1000)[:, None, None, None] + 0.1 * label[:, None, None, None]
        return jnp.concatenate([noise, 0.5 * x], axis=-1) if self.config.model.learn_sigma else noise
