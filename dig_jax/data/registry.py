"""The sources by name."""

import inspect
from collections.abc import Callable

from dig_jax.data.hub import hub
from dig_jax.data.image_folder import image_folder
from dig_jax.data.latents import latents
from dig_jax.data.source import SPLITS, Source, digits, fake
from dig_jax.data.tfds import tfds
from dig_jax.errors import suggest

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "fake": fake,
    "image_folder": image_folder,
    "latents": latents,
    "tfds": tfds,
    "hub": hub,
}


def load_source(name: str, split: str, **options) -> Source:
    """Opens a source by name.

    Args:
        name: a key of `SOURCES`.
        split: "train" or "heldout"; no image is in both.
        **options: what that source's function takes.

    Raises:
        ValueError: for an unknown name, split or option, or a value that cannot be.
        UserError: the images are not there.
    """
    if name not in SOURCES:
        hint = suggest(name, SOURCES)
        raise ValueError(f"data source {name!r} is unknown{hint} (there are: {', '.join(SOURCES)})")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown (there are: {', '.join(SPLITS)})")
    accepted = list(inspect.signature(SOURCES[name]).parameters)[1:]
    for option in options:
        if option not in accepted:
            raise ValueError(
                f"data source {name!r} has no option {option!r} (it takes: {', '.join(accepted) or 'none'})"
            )
    return SOURCES[name](split, **options)
