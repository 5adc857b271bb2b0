"""Buckets of aspect ratios: each image is cropped to the size nearest to its shape, each batch has one size.

Step n of a run takes bucket(n), a function of the seed and n. A cycle of steps holds round(images of the
bucket / batch size) batches of each bucket in a random order, so that all images are seen about equally
often. Each bucket has its own endless sequence of shuffled epochs, from which its k-th batch takes the k-th
part. So any process can read its shard of any step, and a run resumes exactly.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dig_jax.data.encoded import EncodedSource
from dig_jax.data.order import BUCKETS, Shuffled, cycles
from dig_jax.data.source import Source

Sizes = tuple[tuple[int, int], ...]
"""(height, width) of each bucket, in pixels."""


def parse_buckets(text: str) -> Sizes:
    """Return the sizes in a text such as "256x256,320x192".

    Raises:
        ValueError: anything else, or a size that occurs twice.
    """
    parts = text.split(",") if text else []
    matches = [re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", part) for part in parts]
    sizes = tuple((int(match[1]), int(match[2])) for match in matches if match)
    if len(sizes) < len(parts) or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"invalid sizes: got {text!r}; expected different sizes HEIGHTxWIDTH, such as 256x256,320x192"
        )
    return sizes


class Buckets:
    """The images of a source by bucket.

    Args:
        source: encoded images; the headers of all of them are read.
        sizes: the buckets.
        batch_size: images per step over all processes.
        seed: non-negative seed of the order.

    Attributes:
        sizes: the buckets.
        batch_size: images per step over all processes.

    Raises:
        ValueError: a source with images of one size, or a bucket with less than a batch of images.
        UserError: the images are unreadable.
    """

    def __init__(self, source: Source, sizes: Sizes, *, batch_size: int, seed: int):
        if not isinstance(source, EncodedSource):
            raise ValueError(
                f"unsupported data source {source.name!r}, whose images have one size; expected"
                " image_folder, tfds or hub"
            )
        self.sizes, self.batch_size = sizes, batch_size
        self._sources = [source.resized(size) for size in sizes]
        nearest = _nearest(source.native_sizes(), sizes)
        self._members = [np.flatnonzero(nearest == number) for number in range(len(sizes))]
        for size, members in zip(sizes, self._members, strict=True):
            if len(members) < batch_size:
                raise ValueError(
                    f"too few images for bucket {_name(size)}: got {len(members):,}, by bucket"
                    f" {', '.join(self.counts)}; expected at least data.batch_size={batch_size}"
                )
        self._orders = [Shuffled(len(members), seed) for members in self._members]
        self._batches = [round(len(members) / batch_size) for members in self._members]
        self._slots = np.repeat(np.arange(len(sizes)), self._batches)
        self._cycle = cycles(len(self._slots), seed, BUCKETS)

    @property
    def counts(self) -> list[str]:
        """The number of images of each bucket, as text."""
        return [f"{_name(s)}: {len(m):,}" for s, m in zip(self.sizes, self._members, strict=True)]

    def choose(self, first: int, count: int) -> tuple[EncodedSource, Int[np.ndarray, " b"]]:
        """Return the source and the indices of consecutive examples of one batch.

        Args:
            first: the first example, counted over all processes and steps.
            count: number of examples.
        """
        step, offset = divmod(first, self.batch_size)
        number, place = divmod(step, len(self._slots))
        cycle = self._slots[self._cycle(number)]
        bucket = int(cycle[place])
        before = number * self._batches[bucket] + np.count_nonzero(cycle[:place] == bucket)
        positions = before * self.batch_size + offset + np.arange(count)
        return self._sources[bucket], self._members[bucket][self._orders[bucket].at(positions)]


def _nearest(native: Int[np.ndarray, "n 2"], sizes: Sequence[tuple[int, int]]) -> Int[np.ndarray, " n"]:
    """Return the index of the size with the nearest logarithm of height/width for each image."""
    ratios, wanted = (np.log(x[:, 0] / x[:, 1]) for x in (native, np.asarray(sizes)))
    return np.abs(ratios[:, None] - wanted).argmin(1)


def _name(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))
