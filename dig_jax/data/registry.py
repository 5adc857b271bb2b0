"""The image sources by name."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dig_jax.data.options import OptionError, checked_options
from dig_jax.data.source import SPLITS, Source
from dig_jax.errors import ConfigError, UserError, naming_setting, suggest

# A source NAME is the function NAME(split, **options) -> Source in the module dig_jax.data.NAME.
SOURCES = ("digits", "fake", "image_folder", "latents", "tfds", "hub")


def loader(name: str) -> Callable[..., Source]:
    """Return the function that opens a source, importing its module.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SOURCES:
        raise ValueError(
            f"unknown data source {name!r}; expected {', '.join(SOURCES)}{suggest(name, SOURCES)}"
        )
    return getattr(importlib.import_module(f"dig_jax.data.{name}"), name)


def load_source(name: str, split: str, **options) -> Source:
    """Open a source.

    Args:
        name: one of `SOURCES`.
        split: "train" or "heldout"; no image is in both.
        **options: keyword arguments of the source's function.

    Raises:
        ValueError: an unknown name, split or option, or an invalid value.
        UserError: the images are missing or unreadable.
    """
    return _load(name, split, options)


def open_source(path: str, name: str, split: str, options: Mapping[Any, Any]) -> Source:
    """Open the source of a config.

    Args:
        path: the group of fields that describes it, for messages: config.data or config.encode.
        name: one of `SOURCES`.
        split: "train" or "heldout".
        options: the group's options.

    Raises:
        ConfigError: an unknown name or option, an invalid value, missing or unreadable images, or none to
            train on. The message names the field.
    """
    with _naming_options(path):
        source = _load(name, split, options)
        if split == "train" and not len(source):
            raise UserError(f"no images in the training split of data source {name!r}; expected at least 1")
        return source


def source_options(path: str, name: str, options: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the options of a config's source without opening it; see `checked_options`.

    Raises:
        ConfigError: an unknown name or option, or an invalid value. The message names the field.
    """
    with _naming_options(path):
        return checked_options(name, loader(name), options)


@contextlib.contextmanager
def _naming_options(path: str) -> Iterator[None]:
    with naming_setting(path):
        try:
            yield
        except OptionError as error:
            raise ConfigError(error.named(f"{path}.options")) from error


def _load(name: str, split: str, options: Mapping[Any, Any]) -> Source:
    open_split = loader(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected {' or '.join(SPLITS)}")
    return open_split(split, **checked_options(name, open_split, options))
