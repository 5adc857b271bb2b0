"""The model families, one row each, and `create_model`."""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from flax import nnx

from dig_jax.errors import suggest
from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.dig import DiGOptions
from dig_jax.models.dis import DiS, DiSOptions
from dig_jax.models.dit import DiT, DiTOptions
from dig_jax.models.options import ModelOptions
from dig_jax.models.u_dig import UDiGOptions, UShapedTransformer


@dataclasses.dataclass(frozen=True)
class Size:
    """Default sizes of a named model."""

    depth: int
    hidden_size: int
    num_heads: int


@dataclasses.dataclass(frozen=True)
class USize(Size):
    """Default sizes of a named U-DiG."""

    wide_end: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        options: dataclass of the options and their defaults; its method `pattern` returns the blocks.
        sizes: default sizes by their names, such as "XL".
        constructor: (name, options, input_size=, num_classes=, rngs=) → model.
        patch_size: patch size of names without one; None: every name has one.
    """

    name: str
    options: type[ModelOptions]
    sizes: Mapping[str, Size]
    constructor: type[DiffusionTransformer] = DiffusionTransformer
    patch_size: int | None = None


# Sizes: table 1 of each paper; the heads of DiG are from the released code, DiT-H is from JiT (Li & He 2025).
# No sizes of U-DiG were published. Those of DiS are from its released code. It has no size with the
# parameters of DiG's models, which WIDTHxDEPTH adds.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "DiG",
            DiGOptions,
            {
                "S": Size(12, 384, 6),
                "B": Size(12, 768, 12),
                "L": Size(24, 1024, 16),
                "XL": Size(28, 1152, 18),
            },
        ),
        Family(
            "DiT",
            DiTOptions,
            {
                "S": Size(12, 384, 6),
                "B": Size(12, 768, 12),
                "L": Size(24, 1024, 16),
                "XL": Size(28, 1152, 16),
                "H": Size(32, 1280, 16),
            },
            DiT,
        ),
        Family(
            "U-DiG",
            UDiGOptions,
            {
                "S": USize(12, 128, 2, wide_end=True),
                "B": USize(13, 256, 4),
                "L": USize(24, 384, 6),
                "XL": USize(28, 384, 6, wide_end=True),
            },
            UShapedTransformer,
            patch_size=1,
        ),
        Family(
            "DiS",
            DiSOptions,
            {
                "S": Size(24, 368, 1),
                "B": Size(24, 768, 1),
                "M": Size(48, 768, 1),
                "L": Size(48, 1024, 1),
                "H": Size(48, 1536, 1),
                "384x24": Size(24, 384, 1),
                "768x26": Size(26, 768, 1),
                "1024x56": Size(56, 1024, 1),
                "1152x64": Size(64, 1152, 1),
            },
            DiS,
        ),
    )
}


def find_model(name: str) -> tuple[Family, str, int]:
    """Return the family, size and patch size of a model name such as "DiG-S/2" or "U-DiG-S".

    Raises:
        ValueError: unknown model.
    """
    match = re.fullmatch(r"(.+)-(\w+?)(?:/([1-9]\d{0,3}))?", name)
    family = FAMILIES.get(match[1]) if match else None
    patch_size = family and match and (int(match[3]) if match[3] else family.patch_size)
    if not (family and match and patch_size and match[2] in family.sizes):
        known = [
            f"{family}-{size}" if row.patch_size else f"{family}-{size}/2"
            for family, row in FAMILIES.items()
            for size in row.sizes
        ]
        likely = [each for each in known if each.startswith(name)] or known
        raise ValueError(
            f"unknown model {name!r}{suggest(name, likely)}; expected {', '.join(known)}, or another patch"
            " size"
        )
    return family, match[2], patch_size


def accepted_options(name: str) -> frozenset[str]:
    """Return the names of the options that `create_model(name, ...)` accepts.

    Raises:
        ValueError: unknown model.
    """
    return frozenset(field.name for field in dataclasses.fields(find_model(name)[0].options))


def create_model(
    name: str,
    *,
    input_size: int | np.integer | tuple[int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    **overrides,
) -> DiffusionTransformer:
    """Create a model by its name: family, size and patch size, such as "DiG-S/2"; "U-DiG-S" has patches of 1.

    Args:
        input_size: size or (height, width) of the input, in latent pixels if there is an autoencoder.
        num_classes: 0 for an unconditional model.
        rngs: source of the initial parameters.
        overrides: fields of the family's options, such as `DiGOptions`. None for depth,
            hidden_size, num_heads or patch_size selects the named model's value.

    Raises:
        ValueError: an unknown name or option, an invalid value, or sizes that do not fit together.
    """
    family, options = resolve_options(name, **overrides)
    square = isinstance(input_size, int | np.integer)
    height, width = (input_size, input_size) if square else input_size
    return family.constructor(
        family.name,
        options,
        input_size=(int(height), int(width)),
        num_classes=num_classes,
        rngs=rngs,
    )


def resolve_options(name: str, **overrides) -> tuple[Family, ModelOptions]:
    """Return a model's family and its options, with the sizes of its name; arguments as in `create_model`.

    Raises:
        ValueError: an unknown name or option, or an invalid value.
    """
    family, size, patch_size = find_model(name)
    accepted = accepted_options(name)
    for key in overrides:
        if key not in accepted:
            raise ValueError(f"unknown option {key!r} of {family.name}{suggest(key, accepted)}")
    named: dict[str, Any] = dataclasses.asdict(family.sizes[size]) | {"patch_size": patch_size}
    given = {key: value for key, value in overrides.items() if key not in named or value is not None}
    for field in dataclasses.fields(family.options):
        allowed = _choices(field.type)
        if allowed and given.get(field.name, allowed[0]) not in allowed:
            expected = ", ".join(map(str, allowed))
            raise ValueError(f"invalid {field.name}={given[field.name]!r}; expected one of {expected}")
    return family, family.options(**named | given)


def _choices(annotation: Any) -> tuple:
    """Return the values that a type such as `Literal["a", "b"] | None` lists, or () if it lists none."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return ()
    members = typing.get_args(annotation)
    listed = tuple(value for member in members for value in _choices(member))
    return (*listed, None) if listed and types.NoneType in members else listed
