import oracle
import pytest
from gla_test_base import GOLDEN, golden_arrays


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_oracle_matches_the_public_torch_implementation(path):
    arrays, cotangents, expected = golden_arrays(path)
    actual = list(oracle.recurrence(arrays, cotangents).values())[: len(expected)]
    oracle.assert_close(actual, expected, 1e-6, oracle.NAMES[: len(expected)])
