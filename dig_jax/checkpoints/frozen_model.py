"""A second model beside the one that is trained or sampled from: it is only evaluated."""

import dataclasses

import jax
from jax.sharding import Mesh

from dig_jax.checkpoints.reader import model_path, read_model
from dig_jax.components import Components, ModelSpec, Params
from dig_jax.parallel import state_sharding


def read_frozen_model(
    name: str, path: str, components: Components, mesh: Mesh | None
) -> tuple[ModelSpec, Params]:
    """Return a model for the same images and process, on the devices of the mesh.

    Args:
        name: the field that names the path, for messages.
        path: workdir, checkpoint, exported file, or hf://OWNER/NAME.
        components: images and process that it must have been trained on.
        mesh: the devices; None leaves the parameters where they are.

    Raises:
        CheckpointError: it does not exist or is unreadable.
        ConfigError: an invalid path, or a failed download.
        ValueError: it was trained on other images, with other noise or to predict something else.
    """
    other, _, params = read_model(model_path(path))
    sizes = [(c.image_spec.image_shape, c.image_spec.num_classes) for c in (other, components)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name}={path} has images {sizes[0][0]} of {sizes[0][1]} classes; expected {sizes[1][0]} of"
            f" {sizes[1][1]}"
        )
    for field in ("process", "schedule", "num_steps", "path", "prediction"):
        got, expected = (getattr(c.config.diffusion, field) for c in (other, components))
        if got != expected:
            raise ValueError(f"{name}={path} has diffusion.{field}={got!r}; expected {expected!r}")
    scales = [c.diffusion.noise_scale for c in (other, components)]
    if scales[0] != scales[1]:
        raise ValueError(f"{name}={path} has diffusion.noise_scale={scales[0]:g}; expected {scales[1]:g}")
    # The implementation that trained it may not run on this machine.
    config = dataclasses.replace(other.config.model, implementation=None)
    spec = dataclasses.replace(other.model_spec, config=config)
    return spec, params if mesh is None else jax.device_put(params, state_sharding(params, mesh))
