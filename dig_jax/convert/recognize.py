"""Which model somebody's parameters are of, and the config that describes it."""

import math
import re
from collections.abc import Mapping
from typing import Any

from dig_jax.config import Config, from_dict, to_dict
from dig_jax.convert.sources import UpstreamParams
from dig_jax.data import ImageSpec
from dig_jax.data.class_names import imagenet_ids
from dig_jax.errors import CheckpointError, ConfigError

# width → size and, which DiT's tensors do not show, heads: table 1 of DiT.
_SIZES = {384: ("S", 6), 768: ("B", 12), 1024: ("L", 16), 1152: ("XL", 16)}
_FAMILIES = {"attn.gk_proj.0.weight": "DiG", "attn.qkv.weight": "DiT"}
EMA = "0.9999"  # upstream's decay
_AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # the recipe's, of four channels


def recognize(source: UpstreamParams, **options: Any) -> Config:
    """The config of a model that the arrays fit, as far as their names and shapes tell.

    Args:
        options: what is known better, or cannot be told: model (a name such as "DiG-XL/2"), input_size,
            num_classes, num_heads, directions, conv, skip_alignment; None leaves them open.

    Raises:
        CheckpointError: the names are those of no known model.
        ConfigError: an option is missing, or cannot be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    family = _family(source)
    width, channels, patch, _ = _shape(source, "x_embedder.proj.weight", 4)
    outputs, _ = _shape(source, "final_layer.linear.weight", 2)
    name = given.pop("model", None)
    if name is not None and name.replace("SiT", "DiT").split("-")[0] != family:
        raise ConfigError(f"--model={name}: the names of its parameters are those of {family}")
    size, heads = _SIZES.get(width, ("S", None))
    model = {
        "name": f"{family}-{size}/{patch}",
        "depth": _depth(source),
        "hidden_size": width,
        "num_heads": given.pop("num_heads", None) or _heads(source, width) or heads,
    }
    if name is not None:
        model |= {"name": name.replace("SiT", "DiT"), "depth": None, "hidden_size": None, "num_heads": None}
    elif model["num_heads"] is None:
        raise ConfigError("--num_heads is needed: DiT's parameters do not show how many heads there are")
    data = {
        "image_size": given.pop("input_size", None) or _input_size(source, patch),
        "channels": channels,
        "num_classes": given.pop("num_classes", None) or _num_classes(source),
    }
    blocks = {re.sub(r"^blocks\.\d+\.", "", name) for name in source.stored}
    model |= {
        "learn_sigma": outputs != patch**2 * channels,
        "conv": "after" if "dw_conv.weight" in blocks else None,
        "norm": "rms" if "norm1.weight" in blocks else "layer",
        "skip": "linear" if "skip_linear.weight" in blocks else None,
        # The parameters were trained with the skips as the released code joins them.
        "skip_alignment": "upstream" if "skip_linear.weight" in blocks else "raster",
    }
    return describe(model | given, data, EMA if source.tree == "ema" else "params")


def is_flow_matching(source: UpstreamParams, name: str) -> bool:
    """Whether a file or model of this name, or the run that wrote it, is SiT's."""
    model = source.hints.get("model")
    return name.lower().startswith("sit") or (isinstance(model, str) and model.startswith("SiT"))


def looks_like_official_dit(source: UpstreamParams, settings: Config) -> bool:
    """Whether arrays have the shapes of the published DiT-XL/2, and no run's arguments beside them."""
    classes, channels = (settings.data.options[name] for name in ("num_classes", "channels"))
    return (
        (settings.model.name, classes, channels, settings.model.learn_sigma) == ("DiT-XL/2", 1000, 4, True)
        and (settings.model.depth or 28) == 28
        and "model" not in source.hints
    )


def describe(model: Mapping[str, Any], data: Mapping[str, Any], ema: str) -> Config:
    """The published recipe with another model; its data are made up, and of the right shape.

    The other values are those of configs/base.py, which says what they mean.

    Raises:
        ConfigError: a value cannot be.
    """
    fields = to_dict(Config())
    fields["model"] |= model
    fields["data"] |= {"name": "fake", "options": dict(data)}
    fields["sampling"]["ema"] = ema
    fields["autoencoder"]["path"] = _AUTOENCODER if data["channels"] == 4 else None
    return from_dict(fields)


def images_of(settings: Config) -> ImageSpec:
    """Shape and classes of what a converted model makes; a thousand classes are ImageNet's."""
    size, channels, classes = (
        settings.data.options[name] for name in ("image_size", "channels", "num_classes")
    )
    names = imagenet_ids() if classes == 1000 else tuple(map(str, range(classes)))
    return ImageSpec((size, size, channels), names)


def _family(source: UpstreamParams) -> str:
    for name, family in _FAMILIES.items():
        if f"blocks.0.{name}" in source.stored:
            return family
    first = ", ".join(name[:60] for name in list(source.stored)[:3])
    raise CheckpointError(
        "the names of its arrays are not those of DiG, DiT or SiT in their released code, nor of diffusers'"
        f" DiT (the first are: {first or 'none at all'}); in a file with several trees, --tree names one"
    )


def _depth(source: UpstreamParams) -> int:
    found = (re.match(r"blocks\.(\d+)\.", name) for name in source.stored)
    blocks = {match[1] for match in found if match}
    missing = [str(block) for block in range(len(blocks)) if str(block) not in blocks]
    if missing:
        raise CheckpointError(f"block {missing[0]} is missing, and there are later ones")
    return len(blocks)


def _shape(source: UpstreamParams, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in source.stored:
        raise CheckpointError(f"missing: {name}")
    shape = source.stored[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(f"{name} has the shape {shape}, and not one of {dimensions} dimensions")
    return shape


def _heads(source: UpstreamParams, width: int) -> int | None:
    """DiG has a norm of each head's values; diffusers' config says it."""
    norm = source.stored.get("blocks.0.attn.g_norm_swish_gate.weight")
    if norm is not None and norm.shape and norm.shape[0]:
        return width // norm.shape[0]
    heads = source.hints.get("num_attention_heads")
    return heads if type(heads) is int else None


def _num_classes(source: UpstreamParams) -> int:
    """One less than the rows of the table, of which the last is the null class."""
    name = "y_embedder.embedding_table.weight"
    return _shape(source, name, 2)[0] - 1 if name in source.stored else 0


def _input_size(source: UpstreamParams, patch: int) -> int:
    """The side of a square image, by the table of positions or diffusers' config."""
    if "pos_embed" in source.stored:
        tokens = _shape(source, "pos_embed", 3)[1]
        if math.isqrt(tokens) ** 2 == tokens:
            return math.isqrt(tokens) * patch
    if type(size := source.hints.get("sample_size")) is int:
        return size
    raise ConfigError(
        "--input_size is needed: the file does not show the size of the model's images or latents"
    )
