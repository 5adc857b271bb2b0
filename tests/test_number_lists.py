"""Lists of labels and seeds on the command line."""

import numpy as np
import pytest

from dig_jax.cli.number_lists import numbers
from dig_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("7", [7]), ("0,3,5-7", [0, 3, 5, 6, 7]), ("2,2", [2, 2]), ("4-4", [4])],
)
def test_lists_of_numbers_are_read(text, expected):
    result = numbers(text, "labels")
    assert result is None if expected is None else np.array_equal(result, expected)


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "3-", "3-1", "1 2", "1-2-3", "1.5", "9" * 30])
def test_an_invalid_list_of_numbers_is_refused(text):
    with pytest.raises(ConfigError, match=r"invalid --labels='.*'; expected numbers and ranges"):
        numbers(text, "labels")


def test_a_huge_range_is_refused():
    with pytest.raises(ConfigError, match="invalid --seeds='0-9999999999'; expected at most a million"):
        numbers("0-9999999999", "seeds")
