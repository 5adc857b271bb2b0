"""Which implementation each model runs here, and why not another: the models are lowered, not compiled."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from pallas_gla import dispatch

from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.data import ImageSpec
from dig_jax.doctor.finding import Finding
from dig_jax.errors import UserError, one_line

# Models of the size of their published ones, with one group of blocks: all blocks run the same kernels.
MODELS = ("DiG-XL/2", "DiT-XL/2")
_LATENTS = ImageSpec((32, 32, 4), tuple(map(str, range(1000))))
_OTHERS = ("triton", "mosaic", "xla")
# Kernels of models without GLA, by what their calls in a program contain.
_ATTENTION = {"tpu_custom_call": "JAX's splash attention", "cudnn": "cuDNN's flash attention"}
_SELECTIVE_SCAN = dict.fromkeys(("tpu_custom_call", "triton"), "the kernel of the selective scan")


def default_model(name: str) -> Finding:
    """Return the implementation of a published model in bfloat16, for latents of 256 × 256 pixels."""
    config = Config()
    model = dataclasses.replace(config.model, name=name, depth=4, dtype="bfloat16")
    return _implementations(dataclasses.replace(config, model=model), _LATENTS)


def model(settings: Config) -> Finding:
    """Return the implementation of a config's model."""
    try:
        spec = Components(settings).image_spec
    except UserError:  # `data` reports it
        spec = _LATENTS
    return _implementations(settings, spec)


def data(settings: Config) -> Finding:
    """Return the size of a config's training data."""
    source = Components(settings).train_source
    height, width, channels = source.image_shape
    size = f"{height} × {width} × {channels}, {len(source.class_names)} classes"
    return Finding.of(f"{len(source):,} training examples of {settings.data.name}: {size}")


def _implementations(settings: Config, spec: ImageSpec) -> Finding:
    chosen = settings.model.implementation
    with _choices() as choices:
        program = _lower(settings, spec)
    if not choices and chosen is None:
        is_dis = Components(settings, spec).abstract_model.family == "DiS"
        calls = _SELECTIVE_SCAN if is_dis else _ATTENTION
        found = [text for call, text in calls.items() if call in program]
        return Finding.of(f"{found[0] if found else 'plain JAX'}; the model has no GLA")
    name, reason = choices[0][1:] if choices else (chosen, "set by config.model.implementation")
    lines = [f"GLA runs {name!r}{f': {reason}' if reason else ''}"]
    for other in _OTHERS:
        if other != name:
            lines.append(f"{other}: {_reason(settings, spec, other)}")
    return Finding.of(*lines)


def _reason(settings: Config, spec: ImageSpec, implementation: str) -> str:
    """Return why an implementation does not run, or that it does."""
    changed = dataclasses.replace(settings.model, implementation=implementation)
    try:
        _lower(dataclasses.replace(settings, model=changed), spec)
    except NotImplementedError as error:
        return one_line(error).partition(". Use interpret")[0]
    return f"runs too, with --config.model.implementation={implementation}"


def _lower(settings: Config, spec: ImageSpec) -> str:
    """Return the program of the model, for one image on one of this machine's devices."""
    components = Components(settings, spec)
    model = nnx.to_pure_dict(nnx.split(components.abstract_model)[1])
    # Without shardings, which traces under another mesh leave behind.
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model)
    image = jax.ShapeDtypeStruct((1, *spec.image_shape), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    label = number if spec.num_classes else None
    return jax.jit(components.model_spec.denoise).lower(params, image, number, label).as_text()


@contextlib.contextmanager
def _choices() -> Iterator[list[tuple[str, str, str | None]]]:
    """Yield a list that gets (platform, implementation, reason against a kernel) of each choice."""
    found = []

    def hold(record: logging.LogRecord) -> bool:
        name, platform, reason = record.args[1], record.args[0], record.args[2]  # pyright: ignore
        found.append((platform, name, reason))
        return False

    dispatch.log_once.cache_clear()
    level = dispatch.log.level
    dispatch.log.setLevel(logging.INFO)
    dispatch.log.addFilter(hold)
    try:
        yield found
    finally:
        dispatch.log.removeFilter(hold)
        dispatch.log.setLevel(level)
