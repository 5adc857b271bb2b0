"""Options of image sources: types from the signature of the source's function, and errors that name them."""

import inspect
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from dig_jax.data.images import MAX_PIXELS
from dig_jax.errors import alternatives, suggest

# A label table of a million rows takes gigabytes; a label beyond it is an error in the data.
MAX_CLASSES = 10**6

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 80, 80


class OptionError(ValueError):
    """An option of a source with an invalid value.

    Args:
        source: name of the source.
        option: name of the option.
        value: its value.
        expected: what is allowed.
    """

    def __init__(self, source: str, option: str, value: object, expected: str):
        self._option, self._rest = option, f"; expected {expected}"
        self._value = _repr.repr(value)
        super().__init__(f"invalid {option}={self._value} of the {source} source{self._rest}")

    def named(self, path: str) -> str:
        """Return the message with the name of the option's field, which is below `path`."""
        return f"invalid {path}.{self._option}={self._value}{self._rest}"


def checked_options(source: str, function: Callable[..., Any], options: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the options as the types that a source's function declares.

    Lists become tuples, because JSON has no tuples, whole numbers become floats, and paths become text.

    Raises:
        ValueError: an unknown option.
        OptionError: a value of another type.
    """
    kinds = typing.get_type_hints(function)
    accepted = list(inspect.signature(function).parameters)[1:]
    for option in options:
        if option not in accepted:
            raise ValueError(
                f"unknown option {_repr.repr(option)} of data source {source!r};"
                f" expected {', '.join(accepted) or 'none'}{suggest(str(option)[:80], accepted)}"
            )
    return {option: _typed(source, option, value, kinds[option]) for option, value in options.items()}


def image_shape(source: str, image_size: int | tuple[int, int], channels: int = 3) -> tuple[int, int, int]:
    """Return (height, width, channels) of images of a size, which is one number or (height, width).

    Raises:
        OptionError: there is no such image, or it has more than `MAX_PIXELS` pixels.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise OptionError(source, "image_size", image_size, "at least 1")
    if height * width > MAX_PIXELS:
        raise OptionError(source, "image_size", image_size, f"at most {MAX_PIXELS:,} pixels")
    return height, width, channels


def _typed(source: str, option: str, value: Any, kind: Any) -> Any:
    kinds = typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)
    for one in kinds:
        try:
            return _cast(value, one)
        except TypeError:
            pass
    raise OptionError(source, option, value, alternatives([_described(one) for one in kinds]))


def _cast(value: Any, kind: Any) -> Any:
    """Return a value as a type, or raise a TypeError."""
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        items = typing.get_args(kind)
        if len(items) == len(value):
            return tuple(_cast(*pair) for pair in zip(value, items, strict=True))
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is str and isinstance(value, str | os.PathLike):
        text = str(value)
        if "\0" not in text:  # no path contains it
            return text
    elif kind in _NUMBERS and isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool):
        return kind(value)
    raise TypeError


_NUMBERS = {int: numbers.Integral, float: numbers.Real}
_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "text without null characters"}


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a tuple of {len(typing.get_args(kind))} integers"
    return _NAMES[kind]
