"""Orders that are functions of a seed: NumPy promises never to change raw Philox output."""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

# Random streams derived from one seed: each number is a function of (seed, stream, counter).
ORDER, FLIP, NOISE, BUCKETS = 0, 1, 2, 3


def permutation(length: int, seed: int, stream: int, number: int) -> Int[np.ndarray, " n"]:
    """Return the order of cycle `number` of a stream, by sorting random words."""
    bits = np.random.Philox(np.random.SeedSequence([seed, stream, number]))
    return np.argsort(bits.random_raw(length), kind="stable")


def cycles(length: int, seed: int, stream: int) -> Callable[[int], Int[np.ndarray, " n"]]:
    """Return the function from the number of a cycle to its order, which keeps the last ones."""
    return functools.lru_cache(maxsize=4)(functools.partial(permutation, length, seed, stream))


class Shuffled:
    """The endless sequence of shuffled epochs of the numbers from 0 to length - 1."""

    def __init__(self, length: int, seed: int):
        self._length, self._epoch = length, cycles(length, seed, ORDER)

    def at(self, positions: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """Return the numbers at consecutive positions."""
        epochs, offsets = np.divmod(positions, self._length)
        return np.concatenate([self._epoch(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])
