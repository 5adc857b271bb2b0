"""Infer the model and its config from the names and shapes of upstream's parameters."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dig_jax.config import Config, from_dict, to_dict
from dig_jax.convert.sources import UpstreamParams
from dig_jax.data import ImageSpec
from dig_jax.data.class_names import imagenet_ids
from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.files.safetensors import StoredArray
from dig_jax.models.registry import FAMILIES

# Width → size name and number of heads; DiT's parameters do not show the heads.
_SIZES = {size.hidden_size: (name, size.num_heads) for name, size in FAMILIES["DiT"].sizes.items()}
_FAMILIES = {
    "blocks.0.attn.gk_proj.0.weight": "DiG",
    "blocks.0.attn.qkv.weight": "DiT",
    "in_blocks.0.mixer.A_log": "DiS",
}
# The patch embedding and the table of labels, of DiG and DiT or of DiS.
_PATCHES = ("x_embedder.proj.weight", "patch_embed.proj.weight")
_LABELS = ("y_embedder.embedding_table.weight", "label_emb.embedding_table.weight")
EMA = "0.9999"  # upstream's decay
_AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # the recipe's, of four channels


def recognize(source: UpstreamParams, **options: Any) -> Config:
    """Return the config of the model that the parameters belong to.

    Args:
        options: model (a name such as "DiG-XL/2"), input_size (a number or (height, width)), num_classes,
            num_heads, directions, conv and skip_alignment replace the inferred values; None infers the value.

    Raises:
        CheckpointError: unknown parameter names or invalid shapes.
        ConfigError: an option is invalid, or missing because the parameters do not show it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    model = _name_and_sizes(source, given.pop("model", None), given.pop("num_heads", None))
    _, channels, patch, _ = _shape(source, _patches(source), 4)
    outputs, _ = _shape(source, "final_layer.linear.weight", 2)
    model["learn_sigma"] = outputs != patch**2 * channels
    if _family(source) != "DiS":
        model |= _block_options(source)
    data = {
        "image_size": given.pop("input_size", None) or _input_size(source, patch),
        "channels": channels,
        "num_classes": given.pop("num_classes", None) or _num_classes(source),
    }
    settings = describe(model | given, data, EMA if source.is_average else "params")
    if _label_rows(source) == data["num_classes"] > 0:  # the model has never seen the null class
        sampling = dataclasses.replace(settings.sampling, guidance_scale=1.0)
        settings = dataclasses.replace(settings, sampling=sampling)
    return settings


def _block_options(source: UpstreamParams) -> dict[str, Any]:
    """Return the options that the parameters of DiG's or DiT's blocks show."""
    blocks = {re.sub(r"^blocks\.\d+\.", "", name) for name in source.stored}
    has_skips = "skip_linear.weight" in blocks
    options: dict[str, Any] = {
        "conv": "after" if "dw_conv.weight" in blocks else None,
        "norm": "rms" if "norm1.weight" in blocks else "layer",
        "skip": "linear" if has_skips else None,
        # The released code trained the parameters with this alignment of the skips.
        "skip_alignment": "upstream" if has_skips else "raster",
        "mlp_hidden_size": _mlp_hidden_size(source),
    }
    if _is_lightning(source):
        options["mlp"] = "swiglu"
    if "attn.q_norm.weight" in blocks:
        options["qk_norm"] = True
    if "feat_rope.freqs_cos" in source.stored:
        options["rope"] = True
    return options


def with_null_class(source: UpstreamParams, num_classes: int) -> UpstreamParams:
    """Return the parameters with a row for the null class, the mean of all classes, if the table has none.

    The released code has no such row if it was run with class_dropout_prob=0.
    """
    if not num_classes or _label_rows(source) != num_classes:
        return source
    labels = _labels(source)
    table = source.stored[labels]

    def read() -> np.ndarray:
        rows = table.read()
        return np.concatenate([rows, rows.mean(axis=0, keepdims=True)])

    extended = StoredArray((num_classes + 1, *table.shape[1:]), table.dtype, read)
    return dataclasses.replace(source, stored={**source.stored, labels: extended})


def looks_like_official_dit(source: UpstreamParams, settings: Config) -> bool:
    """Return whether the shapes match the published DiT-XL/2 and no training arguments were saved."""
    classes, channels = (settings.data.options[name] for name in ("num_classes", "channels"))
    return (
        (settings.model.name, classes, channels, settings.model.learn_sigma) == ("DiT-XL/2", 1000, 4, True)
        and (settings.model.depth or 28) == 28
        and "model" not in source.hints
    )


def describe(model: Mapping[str, Any], data: Mapping[str, Any], ema: str) -> Config:
    """Return the default config with this model and synthetic data of the model's image shape.

    Raises:
        ConfigError: an invalid value.
    """
    fields = to_dict(Config())
    fields["model"] |= model
    fields["data"] |= {"name": "fake", "options": dict(data)}
    fields["sampling"]["ema"] = ema
    fields["autoencoder"]["path"] = _AUTOENCODER if data["channels"] == 4 else None
    return from_dict(fields)


def images_of(settings: Config) -> ImageSpec:
    """Return the image shape and classes of a converted model; 1000 classes get ImageNet's names."""
    size, channels, classes = (
        settings.data.options[name] for name in ("image_size", "channels", "num_classes")
    )
    names = imagenet_ids() if classes == 1000 else tuple(map(str, range(classes)))
    height, width = (size, size) if isinstance(size, int) else size
    return ImageSpec((height, width, channels), names)


def _name_and_sizes(source: UpstreamParams, name: str | None, heads: int | None) -> dict[str, Any]:
    """Return the model's name and, unless it was given, the sizes that the parameters show."""
    family = _family(source)
    if name is not None:
        ours = re.sub("^(SiT|LightningDiT)", "DiT", name)  # networks of the family DiT
        if ours.split("-")[0] != family:
            raise ConfigError(
                f"--model={name} does not match the parameters: got parameter names of {family}"
            )
        return {"name": ours, "num_heads": heads}
    width, _, patch, _ = _shape(source, _patches(source), 4)
    if family == "DiS":
        return _dis_sizes(source, width, patch) | {"num_heads": heads}
    size, usual_heads = _SIZES.get(width, ("S", None))
    heads = heads or _heads(source, width) or usual_heads
    if heads is None:
        raise ConfigError("missing --num_heads: the number of heads cannot be inferred from DiT's parameters")
    return {
        "name": f"{family}-{size}/{patch}",
        "depth": _depth(source, "blocks"),
        "hidden_size": width,
        "num_heads": heads,
    }


def _dis_sizes(source: UpstreamParams, width: int, patch: int) -> dict[str, Any]:
    """Return the name of the DiS with these sizes, or those of DiS-S with other sizes."""
    depth = 2 * _depth(source, "in_blocks")
    for name, size in FAMILIES["DiS"].sizes.items():
        if (size.hidden_size, size.depth) == (width, depth):
            return {"name": f"DiS-{name}/{patch}"}
    return {"name": f"DiS-S/{patch}", "depth": depth, "hidden_size": width}


def _mlp_hidden_size(source: UpstreamParams) -> int | None:
    """Infer the width of the MLP; None if it is the family's default."""
    family, width = _family(source), _shape(source, "x_embedder.proj.weight", 4)[0]
    default = FAMILIES[family].options.default_mlp_hidden_size(width)
    down = "blocks.0.mlp.fc2.weight" if family == "DiT" else "blocks.0.mlp.down_proj.weight"
    if _is_lightning(source):
        down, default = "blocks.0.mlp.w3.weight", 8 * width // 3
    if down not in source.stored:  # told by the reader
        return None
    hidden = _shape(source, down, 2)[1]
    return None if hidden == default else hidden


def _is_lightning(source: UpstreamParams) -> bool:
    return "blocks.0.mlp.w12.weight" in source.stored


def _family(source: UpstreamParams) -> str:
    for name, family in _FAMILIES.items():
        if name in source.stored:
            return family
    first = ", ".join(name[:60] for name in list(source.stored)[:3])
    raise CheckpointError(
        f"unknown parameter names: got {first or 'no arrays'}; expected names of the released DiG, DiT, SiT"
        " or DiS, or of diffusers' DiT (--tree selects one of several trees in a file)"
    )


def _depth(source: UpstreamParams, blocks: str) -> int:
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in source.stored)
    numbers = {match[1] for match in found if match}
    missing = [str(number) for number in range(len(numbers)) if str(number) not in numbers]
    if missing:
        raise CheckpointError(f"missing block {missing[0]}; expected consecutive blocks from 0")
    return len(numbers)


def _patches(source: UpstreamParams) -> str:
    return next((name for name in _PATCHES if name in source.stored), _PATCHES[0])


def _labels(source: UpstreamParams) -> str:
    return next((name for name in _LABELS if name in source.stored), _LABELS[0])


def _shape(source: UpstreamParams, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in source.stored:
        raise CheckpointError(f"missing parameter: {name}")
    shape = source.stored[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"invalid shape of {name}: got {shape}; expected {dimensions} nonzero dimensions"
        )
    return shape


def _heads(source: UpstreamParams, width: int) -> int | None:
    """Infer the number of heads from DiG's per-head norm or diffusers' config."""
    norm = source.stored.get("blocks.0.attn.g_norm_swish_gate.weight")
    if norm is not None and norm.shape and norm.shape[0]:
        return width // norm.shape[0]
    heads = source.hints.get("num_attention_heads")
    return heads if type(heads) is int else None


def _label_rows(source: UpstreamParams) -> int:
    labels = _labels(source)
    return _shape(source, labels, 2)[0] if labels in source.stored else 0


def _num_classes(source: UpstreamParams) -> int:
    """Infer the number of classes: the label table has one more row, unless the saved arguments differ."""
    rows = _label_rows(source)
    stated = (source.hints.get(name) for name in ("num_classes", "num_embeds_ada_norm"))
    if rows and rows in stated:
        return rows
    return max(rows - 1, 0)


def _input_size(source: UpstreamParams, patch: int) -> int | tuple[int, int]:
    """Infer the size of the input from the position table or diffusers' config."""
    if "pos_embed" in source.stored:
        _, tokens, width = _shape(source, "pos_embed", 3)
        learned = _family(source) == "DiS"
        if learned:  # also for the tokens of the time and of the label
            tokens -= 2 if _label_rows(source) else 1
        if math.isqrt(tokens) ** 2 == tokens:
            return math.isqrt(tokens) * patch
        columns = 0 if learned else _columns(source.stored["pos_embed"].read()[0, :, : width // 2])
        if columns and tokens % columns == 0:
            return tokens // columns * patch, columns * patch
    if type(size := source.hints.get("sample_size")) is int:
        return size
    raise ConfigError(
        "missing --input_size: the size of the model's images or latents cannot be inferred from the file"
    )


def _columns(encoded: np.ndarray) -> int:
    """Return the number of columns of a table of encoded columns, whose rows repeat; 0 if they do not."""
    encoded = encoded.astype(np.float32)  # NumPy cannot compare bfloat16
    repeats = np.isclose(encoded[1:], encoded[:1], atol=1e-2).all(axis=1)
    return int(np.argmax(repeats)) + 1 if np.any(repeats) else 0
