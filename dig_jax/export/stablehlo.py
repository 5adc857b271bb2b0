"""The sampler as one program for any machine: StableHLO with its parameters, in one npz file.

The file needs JAX, NumPy and flatbuffers, but not this package:

    file = dict(np.load("digits.stablehlo"))
    about = json.loads(str(file.pop("about")))
    program = jax.export.deserialize(file.pop("program").tobytes())
    images = program.call(file, labels, seeds)    # and guidance_scale, if it is among about["inputs"]

What is left in `file` are the parameters. They are arguments of the program and not constants in it, which
keeps results bit-identical with `Sampler`, programs small and large models possible.
"""

import json
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from dig_jax.autoencoder import to_uint8
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.parameter_file import by_name
from dig_jax.errors import UserError, install_command, one_line
from dig_jax.files.paths import Path
from dig_jax.sampling.generate import generate
from dig_jax.sampling.sampler import Request, Sampler, to_pixels

FORMAT = "dig-jax sampler"
PLATFORMS = ("cpu", "cuda", "tpu")
"""Platforms that a file is lowered for."""


def entries(sampler: Sampler) -> dict[str, np.ndarray]:
    """Return the entries of the file: "program", "about" and the parameters.

    The program takes (parameters, labels int32 [b], seeds int32 [b], guidance_scale float32 []) and returns
    uint8 images [b, height, width, channels], for any b. It has no guidance_scale if the config samples
    without guidance. The config sets the sampler, steps and size. Scans run as plain JAX on every
    platform, because their kernels need the batch size.

    Raises:
        ConfigError: invalid sampling options.
        UserError: the package flatbuffers is missing, or the model's parts for this machine are not portable.
    """
    _check_package()
    request = sampler.request()
    trees, graph = _trees(sampler, request)
    parameters, structure = by_name(trees), jax.tree.structure(trees)
    names = list(parameters)
    rule = sampler.components.config.sampling.uint8

    def draw(
        parameters: dict[str, Array],
        labels: Int[Array, " b"],
        seeds: Int[Array, " b"],
        guidance_scale: Float[Array, ""] | float = request.scale,
    ) -> UInt8[Array, "b height width c"]:
        trees = jax.tree.unflatten(structure, [parameters[name] for name in names])
        images, _ = generate(
            trees["model"],
            labels=labels,
            seeds=seeds,
            scale=jnp.float32(guidance_scale),
            spec=request.spec,
            weak_params=trees.get("weak_model"),
        )
        if graph is None:
            return to_pixels(images, rule)
        return to_uint8(nnx.merge(graph, trees["autoencoder"]).decode(images), rule)

    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), jnp.int32)
    inputs = {"labels": batch, "seeds": batch}
    if request.spec.guided:
        inputs["guidance_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        program = jax.export.export(jax.jit(draw), platforms=PLATFORMS)(
            jax.eval_shape(lambda: parameters), *inputs.values()
        )
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"this sampler has no portable form on {jax.default_backend()}: {one_line(error)}; expected plain"
            " JAX, as with JAX_PLATFORMS=cpu"
        ) from error
    about = {"format": FORMAT, "inputs": ["parameters", *inputs], **described(sampler)}
    return {
        "about": np.array(json.dumps(about)),
        "program": np.frombuffer(program.serialize(), np.uint8),
        **{name: np.asarray(value) for name, value in parameters.items()},
    }


def _check_package() -> None:
    try:
        import flatbuffers as _  # noqa: F401  # jax.export imports it to serialize
    except ImportError as error:
        raise UserError(
            f"a StableHLO file needs the package flatbuffers: {install_command('export')}"
        ) from error


def _trees(sampler: Sampler, request: Request) -> tuple[dict[str, Any], nnx.GraphDef | None]:
    """Return all parameters by part, and the structure of the autoencoder, if there is one."""
    trees: dict[str, Any] = {"model": sampler.params}
    if request.weak_params is not None:
        trees["weak_model"] = request.weak_params
    if sampler.components.autoencoder is None:
        return trees, None
    graph, state = nnx.split(sampler.components.autoencoder)
    return trees | {"autoencoder": nnx.to_pure_dict(state)}, graph


def described(sampler: Sampler) -> dict[str, Any]:
    """Return what a program says about its model: config, versions, images, average and step."""
    config = sampler.components.config
    return {
        **config_and_versions(config),
        "images": sampler.components.image_spec.to_dict(),
        "ema": config.sampled_ema,
        "step": sampler.step,
    }


def holds_entries(path: Path, expected: dict[str, np.ndarray]) -> bool:
    """Return whether a file has these entries, whatever the text of its program: tracing may vary it."""
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return set(stored) == set(expected) and all(
                np.array_equal(stored[name], value) for name, value in expected.items() if name != "program"
            )
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
