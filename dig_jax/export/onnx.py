"""The sampler as an ONNX graph with its parameters, for ONNX Runtime on any device and in browsers."""

import dataclasses
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dig_jax.errors import ConfigError, UserError, install_command
from dig_jax.export.stablehlo import described
from dig_jax.models.registry import accepted_options
from dig_jax.sampling.generate import generate_from
from dig_jax.sampling.sampler import Sampler

log = logging.getLogger(__name__)

_LARGEST = 2**31 - 1  # bytes of a protocol buffer


def onnx_model(sampler: Sampler) -> bytes:
    """Return a serialized model: (labels, noise) to images, for any batch size b, all in float32.

    Inputs: `labels` int32 [b]; `noise` float32 [b, height, width, c], standard normal; `guidance_scale`
    float32 [], if the config samples with guidance. Output: `images` float32 [b, height, width, c] in -1 … 1;
    of a latent model, latents to decode. The noise of seed s is `generate.noise`. The metadata "about" is a
    JSON text. The config sets the sampler, steps and size.

    Raises:
        ConfigError: invalid sampling options, or a sampler that draws noise at every step.
        UserError: the package onnx is missing, or the model has a part without an ONNX form.
    """
    try:
        from onnx import helper

        from dig_jax.export.jaxpr_to_onnx import UnsupportedError, to_onnx
    except ImportError as error:
        raise UserError(f"an ONNX file needs the package onnx: {install_command('export')}") from error
    sampler = in_float32(sampler)
    request = sampler.request()

    def draw(
        labels: Int[Array, " b"],
        noise: Float[Array, "b h w c"],
        guidance_scale: Float[Array, ""] | float = request.scale,
    ) -> Float[Array, "b h w c"]:
        return generate_from(
            _only_once(noise, sampler.components.config.sampling.sampler),
            sampler.params,
            labels=labels,
            scale=jnp.float32(guidance_scale),
            spec=request.spec,
            weak_params=request.weak_params,
        )[0]

    (batch,) = jax.export.symbolic_shape("b")
    inputs = {
        "labels": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "noise": jax.ShapeDtypeStruct((batch, *request.spec.shape), jnp.float32),
    }
    if request.spec.guided:
        inputs["guidance_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        model = to_onnx(draw, inputs, "images")
    except UnsupportedError as error:
        raise UserError(f"this sampler has no ONNX form: {error}") from error
    helper.set_model_props(model, {"about": json.dumps(described(sampler))})
    if (size := model.ByteSize()) > _LARGEST:
        raise UserError(f"this model is too large for an ONNX file: got {size} bytes; expected at most 2 GB")
    return model.SerializeToString()


def in_float32(sampler: Sampler) -> Sampler:
    """Return the sampler with plain JAX in float32, which has a translation."""
    config = sampler.components.config
    changes: dict[str, Any] = {"dtype": "float32"}
    if "implementation" in accepted_options(config.model.name):
        changes["implementation"] = "reference"
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    return Sampler(sampler.components.with_config(config), sampler.params, step=sampler.step)


def _only_once(noise: Float[Array, "b h w c"], name: str):
    """Return the noise as a function of its number; steps may not draw any."""
    drawn = iter([noise])

    def numbered(number: Int[Array, ""]) -> Float[Array, "b h w c"]:
        for first in drawn:
            return first
        raise ConfigError(
            f"unsupported config.sampling.sampler={name!r} of an ONNX file, whose only noise is its input;"
            " expected a sampler that draws none at its steps, such as 'dpmpp_2m' or 'ddim'"
        )

    return numbered
