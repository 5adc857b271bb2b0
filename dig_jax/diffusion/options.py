"""Construct a frozen dataclass from options by name, as a config gives them."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from dig_jax.errors import suggest

T = TypeVar("T")


def construct(cls: type[T], options: Mapping[str, Any], owner: str) -> T:
    """Return cls(**options); lists become tuples and integers become floats where the field's type says so.

    Args:
        cls: a dataclass that validates the values of its fields.
        options: values by the names of the fields.
        owner: what has the options, for messages, such as "sampler 'ddim'".

    Raises:
        ValueError: an option is unknown, or its value is invalid.
    """
    kinds = typing.get_type_hints(cls)
    accepted = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for option in options:
        if option not in accepted:
            expected = f"expected one of {', '.join(accepted)}" if accepted else "expected no options"
            raise ValueError(
                f"unknown option of {owner}: got {option!r}; {expected}{suggest(option, accepted)}"
            )
    return cls(**{name: _typed(value, kinds[name], f"{name} of {owner}") for name, value in options.items()})


def _typed(value: Any, kind: Any, what: str) -> Any:
    choices = typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)
    plain = [typing.get_origin(choice) or choice for choice in choices]
    if type(value) in plain:
        return value
    if float in plain and type(value) is int:
        return float(value)
    if tuple in plain and isinstance(value, (list, tuple)):
        return tuple(value)
    names = " or ".join("None" if choice is types.NoneType else choice.__name__ for choice in plain)
    raise ValueError(f"invalid {what}: got {value!r}; expected {names}")
