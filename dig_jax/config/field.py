"""One field of a configuration: its default, description, external form and allowed values."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from dig_jax.errors import ConfigError, alternatives, suggest

_BOUNDS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: value > 0, "a positive number"),
    "nonnegative": (lambda value: value >= 0, "zero or a positive number"),
    "fraction": (lambda value: 0 <= value <= 1, "a number between 0 and 1"),
    "devices": (lambda value: 1 <= value <= 1024, "a number from 1 to 1024"),
    "below_one": (
        lambda value: bool(0 <= np.float32(value) < 1),
        "a number from 0 to less than 1, as float32",
    ),
}
# Programs compute with int32 and float32.
_LARGEST = {int: (2**31 - 1, "2³¹ - 1"), float: (float(np.finfo(np.float32).max), "the largest float32")}


def field(
    default: Any,
    description: str,
    *,
    none: str | int | float | None = None,
    choices: tuple[str, ...] = (),
    bounds: str | None = None,
) -> Any:
    """Declare a field of a configuration dataclass.

    Args:
        default: value of the published recipe, where it has one.
        description: for docs/reference/config_reference.md: meaning, unit, external values, source.
        none: external form of None, on the command line, in a ConfigDict and in config.json: 0, "" or
            "none".
        choices: all allowed values.
        bounds: a name in `_BOUNDS`.
    """
    about = {
        "description": description,
        "none": none,
        "choices": choices,
        "bounds": bounds,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def group(cls: type) -> Any:
    """Declare a field that holds a dataclass of fields."""
    return dataclasses.field(default_factory=cls)


class Group:
    """Base class of configuration dataclasses: each instance checks its fields when it is created.

    A field that allows None also accepts the external form of None and then holds None.

    Args:
        path: name of the group in error messages, such as "config.model".
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # subclasses are dataclasses
    _path: ClassVar[str]

    def __init_subclass__(cls, path: str):
        cls._path = path

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, Group):
                continue
            none = field.metadata["none"]
            if none is not None and value == none:
                object.__setattr__(self, field.name, None)
                continue
            expected, hint = _unmet(field.metadata, value)
            if expected:
                raise ConfigError(f"invalid {self._path}.{field.name}={value!r}; expected {expected}{hint}")


def _unmet(about: Mapping[str, Any], value: Any) -> tuple[str, str]:
    """Return a description of the allowed values and a hint, or empty strings if the value is valid."""
    none = () if about["none"] is None else (about["none"],)
    if about["choices"] and value not in about["choices"]:
        choices = (*none, *about["choices"])
        return alternatives(choices), suggest(value, choices)
    hint = f", or {none[0]!r}" if none else ""
    if about["bounds"]:
        is_allowed, expected = _BOUNDS[about["bounds"]]
        if not (is_allowed(value) and (isinstance(value, int) or math.isfinite(value))):
            return expected, hint
    largest, name = _LARGEST.get(type(value), (None, ""))
    if largest is not None and abs(value) > largest:
        return f"at most {name}", hint
    return "", ""
