"""Lists of numbers and of class names in flags, such as --seeds=0,3,5-7."""

import re
from collections.abc import Sequence

import numpy as np

from dig_jax.data.class_names import class_index
from dig_jax.errors import ConfigError, naming_setting

_MAX_COUNT = 10**6


def numbers(text: str | None, flag: str) -> np.ndarray | None:
    """Return the numbers of a list such as "0,3,5-7", here [0, 3, 5, 6, 7]; None for None.

    Raises:
        ConfigError: the text is not such a list, or has more than a million numbers.
    """
    return None if text is None else _join(list(map(_range, text.split(","))), text, flag)


def labels(text: str | None, class_names: Sequence[str]) -> np.ndarray | None:
    """Return the class indices of a list such as "0,5-7,golden retriever", here [0, 5, 6, 7, 207].

    Digits are always an index, even if classes are named by numbers: names are sorted as text, so index 2 of
    the hundred classes "1", "2", …, "100" is the class "100".

    Args:
        text: indices, ranges and names, separated by commas.
        class_names: names of all classes, by index; see `class_index`.

    Raises:
        ConfigError: a class is unknown, or the text is not such a list or has more than a million numbers.
    """
    if text is None:
        return None
    items = [item.strip() for item in text.split(",")]
    with naming_setting("--labels"):
        named = {item: class_index(item, class_names) for item in items if re.search(r"[^\d-]", item)}
    return _join([_range(str(named.get(item, item))) for item in items], text, "labels")


def _range(item: str) -> range:
    """Return the numbers of "5-7" or "5"; an empty range for other texts."""
    bounds = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", item)
    return range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1) if bounds else range(0)


def _join(ranges: Sequence[range], text: str, flag: str) -> np.ndarray:
    if not all(ranges):
        raise ConfigError(f"invalid --{flag}={text!r}; expected numbers and ranges such as 0,3,5-7")
    if sum(map(len, ranges)) > _MAX_COUNT:
        raise ConfigError(f"invalid --{flag}={text!r}; expected at most a million numbers")
    return np.concatenate(ranges)
