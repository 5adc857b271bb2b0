"""Lists of numbers and of class names in flags, such as --seeds=0,3,5-7."""

import logging
import re
from collections.abc import Sequence

import numpy as np

from dig_jax.data.class_names import class_index
from dig_jax.errors import ConfigError, naming_setting

_MAX_COUNT = 10**6
# The text before a comma that is not in double quotes.
_ITEM = re.compile(r'((?:[^,"]|"[^"]*"?)*),')

log = logging.getLogger(__name__)


def numbers(text: str | None, flag: str) -> np.ndarray | None:
    """Return the numbers of a list such as "0,3,5-7", here [0, 3, 5, 6, 7]; None for None.

    Raises:
        ConfigError: the text is not such a list, or has more than a million numbers.
    """
    return None if text is None else _join(list(map(_range, text.split(","))), text, flag)


def labels(text: str | None, class_names: Sequence[str]) -> np.ndarray | None:
    """Return the class indices of a list such as "0,5-7,golden retriever", here [0, 5, 6, 7, 207].

    Digits are always an index, even if classes are named by numbers: names are sorted as text, so index 2 of
    the hundred classes "1", "2", …, "100" is the class "100". A note tells if this may surprise.

    Args:
        text: indices, ranges and names, separated by commas. Text in double quotes is a name.
        class_names: names of all classes, by index; see `class_index`.

    Raises:
        ConfigError: a class is unknown, or the text is not such a list or has more than a million numbers.
    """
    if text is None:
        return None
    with naming_setting("--labels"):
        numbers = _join(
            [_label(item.strip(), class_names) for item in _ITEM.findall(f"{text},")], text, "labels"
        )
    _note_numeric_names(text, numbers, class_names)
    return numbers


def _label(item: str, class_names: Sequence[str]) -> range:
    """Return the index of a name, or the indices of a range."""
    quoted = re.fullmatch('"(.*)"', item, re.DOTALL)
    if not quoted and not re.search(r"[^\d-]", item):
        return _range(item)
    index = class_index(quoted[1] if quoted else item, class_names)
    return range(index, index + 1)


def _note_numeric_names(text: str, numbers: np.ndarray, class_names: Sequence[str]) -> None:
    """Tell if an index is also the name of another class."""
    indices = {name: index for index, name in enumerate(class_names) if name.isdecimal()}
    for number in numbers if '"' not in text else ():
        name, other = class_names[number : number + 1], indices.get(str(number))
        if name and other not in (None, number):
            log.warning(
                "--labels: %d is an index here, of class %r; for the class named %r use its index %d, or the"
                " name in double quotes: --labels='\"%s\"'",
                number,
                name[0],
                str(number),
                other,
                number,
            )
            return


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
