"""The image sources by name."""

import importlib
import inspect
from collections.abc import Callable

from dig_jax.data.source import SPLITS, Source
from dig_jax.errors import suggest

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
    open_source = loader(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected {' or '.join(SPLITS)}")
    accepted = list(inspect.signature(open_source).parameters)[1:]
    for option in options:
        if option not in accepted:
            raise ValueError(
                f"unknown option {option!r} of data source {name!r};"
                f" expected {', '.join(accepted) or 'none'}{suggest(option, accepted)}"
            )
    return open_source(split, **options)
