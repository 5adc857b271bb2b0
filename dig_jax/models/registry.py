"""The named models, as a table, and `create_model`."""

import inspect
import re

import jax.numpy as jnp
from flax import nnx

from dig_jax.errors import suggest
from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.dig import DiG
from dig_jax.models.dit import DiT

# depth, hidden_size, num_heads: table 1 of the papers; DiG's heads are those of the released code.
_FIELDS = ("depth", "hidden_size", "num_heads")
_SIZES = {
    "DiG": (DiG, {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 18)}),
    "DiT": (DiT, {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}),
}
MODEL_NAMES = tuple(f"{family}-{size}" for family, (_, sizes) in _SIZES.items() for size in sizes)
_CHOICES = {
    "directions": (4, 2, 1),
    "conv": ("after", "inside", None),
    "norm": ("layer", "rms"),
    "skip": (None, "linear", "identity"),
    "skip_alignment": ("raster", "upstream"),
    "remat": (None, "dots", "full"),
}


def accepted_options(name: str) -> frozenset[str]:
    """Return the names of the options that `create_model(name, ...)` accepts.

    Raises:
        ValueError: unknown model.
    """
    family, _, _ = _parse(name)
    parameters = inspect.signature(_SIZES[family][0].__init__).parameters
    common = {*_FIELDS, "patch_size", "in_channels", "learn_sigma", "dtype", "remat"}
    return (frozenset(parameters) | common) - {"self", "input_size", "rngs", "options"}


def create_model(
    name: str,
    *,
    input_size: int | tuple[int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    patch_size: int | None = None,
    in_channels: int = 4,
    learn_sigma: bool = True,
    **overrides,
) -> DiffusionTransformer:
    """Makes a model by its paper's name, such as "DiG-S/2": family, size, patch size.

    Args:
        input_size: height and width of the input, in latent pixels where there is an autoencoder.
        num_classes: 0 for an unconditional model.
        rngs: the source of the initial parameters.
        patch_size: replaces the one in the name.
        overrides: depth, hidden_size, num_heads, dtype, remat; for DiG also directions, conv, norm, skip,
            skip_alignment, implementation.

    Raises:
        ValueError: an unknown name, override or value, or sizes that do not fit together.
    """
    family, size, patch = _parse(name)
    cls, sizes = _SIZES[family]
    accepted = accepted_options(name)
    for key, value in overrides.items():
        if key not in accepted:
            raise ValueError(f"{family} has no option {key!r}{suggest(key, accepted)}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{key}={value!r} is none of {', '.join(map(repr, _CHOICES[key]))}")
    for key in ("depth", "hidden_size", "num_heads"):
        if overrides.get(key, 1) < 1:
            raise ValueError(f"{key}={overrides[key]} is not positive")
    return cls(
        input_size=(input_size, input_size) if isinstance(input_size, int) else tuple(input_size),
        num_classes=num_classes,
        patch_size=patch_size or patch,
        in_channels=in_channels,
        learn_sigma=learn_sigma,
        rngs=rngs,
        **dict(zip(_FIELDS, sizes[size], strict=True)) | {"dtype": jnp.float32} | overrides,
    )


def _parse(name: str) -> tuple[str, str, int]:
    """Family, size and patch size of a model's name."""
    match = re.fullmatch(r"(\w+-\w+)/(\d+)", name)
    if match is None or match[1] not in MODEL_NAMES:
        known = [f"{model}/2" for model in MODEL_NAMES]
        raise ValueError(f"unknown model {name!r}{suggest(name, known)} (known: {', '.join(known)}, /4, …)")
    family, size = match[1].split("-")
    return family, size, int(match[2])
