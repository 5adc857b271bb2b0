"""Batches for training, resumable from the count of examples consumed, and one pass for evaluation.

The n-th example of a run, counted over all processes, is a function of (seed, n) alone: n // len(source) is
its epoch, each epoch has its own permutation, and n picks the blocks of random bits that decide its flip and,
where there is one, its draw from a posterior. A run is therefore continued exactly by `start=n`, with any
batch size and any number of processes.
"""

import functools
import math
import os
import sys
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from dig_jax.data.source import Example, Source

Batch = dict[str, np.ndarray]

# The streams of random numbers that one seed gives: each is a function of (seed, stream, counter).
_ORDER, _FLIP, _NOISE = 0, 1, 2
# Images whose noise is drawn at once: between NumPy's calls Python's lock changes hands.
_DRAWN = 8


@runtime_checkable
class RandomSource(Protocol):
    """A source whose training examples are drawn from a distribution; `source[index]` is its mean."""

    def draw(self, index: int, mirrored: bool, noise: Float32[np.ndarray, "h w c"]) -> Example:
        """An example with a float32 image, by standard normal noise of its shape.

        Args:
            index: of the example.
            mirrored: left to right.
            noise: of the image's shape.
        """
        ...


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    flip: bool = False,
    num_threads: int | None = None,
    prefetch: int = 8,
) -> grain.DatasetIterator[Batch]:
    """Endless training batches of this process.

    Batch j of the run holds examples start + j·batch_size … start + (j+1)·batch_size - 1, of which process p
    reads the p-th contiguous part. Epochs follow each other without a gap, so a batch may span two or more.

    Args:
        source: where the examples come from.
        batch_size: images per step over all processes.
        seed: non-negative; order and flips depend on it.
        start: examples consumed so far by all processes.
        process_index: of this process, counted from 0.
        process_count: how many processes share a batch.
        flip: mirror half of the images left to right, drawn anew in each epoch, if `source.flip` allows it.
        num_threads: batches made at the same time; 0 makes each one when it is asked for; None: as many as
            there are cores, from 4 to 32, as Pillow decodes and resizes without holding Python's lock; or one
            where examples are drawn, in steps so short that more threads would only fight for the lock.
        prefetch: batches kept ready, if there are no more threads than that.

    Returns:
        An iterator of {"image": float32 [b, h, w, c], "label": int32 [b]}, b = batch_size / process_count.
        Pixels are in [-1, 1], latents are fresh draws. Its `close()` ends the threads.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    share = _share(source, batch_size, process_index, process_count)
    if seed < 0 or start < 0:
        raise ValueError(f"seed and start must not be negative, got seed={seed}, start={start}")
    mirror = flip and source.flip

    def load(first: int) -> Batch:
        positions = np.arange(first, first + share)
        indices = _shuffled(len(source), seed, positions)
        mirrored = _coins(seed, positions) if mirror else np.zeros(share, bool)
        if isinstance(source, RandomSource):
            noise = _noise(seed, first, source.image_shape)
            drawn = zip(indices.tolist(), mirrored.tolist(), noise, strict=False)
            return _stacked([source.draw(*one) for one in drawn])
        batch = _stacked([source[index] for index in indices.tolist()])
        batch["image"][mirrored] = batch["image"][mirrored, :, ::-1]
        return batch

    firsts = grain.MapDataset.range(start + process_index * share, sys.maxsize, batch_size)
    return iter(firsts.map(load).to_iter_dataset(_read_options(source, num_threads, prefetch)))


def epoch(
    source: Source,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    prefetch: int = 8,
) -> grain.DatasetIterator[Batch]:
    """One pass over a source in its own order, in batches of one shape.

    The last batch is filled up with the last image; `mask` says which entries count. Every process gets
    the same number of batches, and its contiguous part of each.

    Args:
        source: where the examples come from.
        batch_size: images per step over all processes.
        process_index: of this process, counted from 0.
        process_count: how many processes share a batch.
        num_threads: as in `batches`.
        prefetch: as in `batches`.

    Returns:
        An iterator of {"image": float32 [b, h, w, c], "label": int32 [b], "mask": bool [b]}. Pixels are in
        [-1, 1], latents are means.

    Raises:
        ValueError: if the arguments do not fit together.
    """
    share = _share(source, batch_size, process_index, process_count)

    def load(first: int) -> Batch:
        indices = np.arange(first, first + share)
        batch = _stacked([source[index] for index in np.minimum(indices, len(source) - 1).tolist()])
        return {**batch, "mask": indices < len(source)}

    offset = process_index * share
    firsts = grain.MapDataset.range(offset, len(source) + offset, batch_size)
    return iter(firsts.map(load).to_iter_dataset(_read_options(source, num_threads, prefetch)))


def normalize(images: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Pixels 0 … 255 as -1 … 1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _usable_cores() -> int:
    """Cores that this process may run on; macOS and Windows know only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_options(source: Source, num_threads: int | None, prefetch: int) -> grain.ReadOptions:
    if num_threads is None and isinstance(source, RandomSource):
        num_threads = 1
    return read_options(num_threads, prefetch)


def read_options(num_threads: int | None, prefetch: int) -> grain.ReadOptions:
    """How many items are made at the same time and kept ready; the arguments are those of `batches`."""
    if num_threads is None:
        num_threads = min(max(_usable_cores(), 4), 32)
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads))


def _share(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    """This process's part of a batch, after checking that there is one."""
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be from 0 to process_count - 1 = {process_count - 1}, got {process_index}"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {process_count} processes, got {batch_size}"
        )
    if not len(source):
        raise ValueError(f"data source {source.name!r} has no images in its {source.split!r} split")
    return batch_size // process_count


def _stacked(examples: list[Example]) -> Batch:
    images = np.stack([example["image"] for example in examples])
    return {
        "image": normalize(images) if images.dtype == np.uint8 else images,
        "label": np.array([example["label"] for example in examples], np.int32),
    }


def _shuffled(length: int, seed: int, positions: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
    """Source indices of these consecutive positions in the endless sequence of shuffled epochs."""
    epochs, offsets = np.divmod(positions, length)
    parts = [_permutation(length, seed, int(e))[offsets[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _permutation(length: int, seed: int, number: int) -> Int[np.ndarray, " n"]:
    """The order of epoch `number`: the ranks of raw Philox output, which NumPy promises never to change.

    grain's own `shuffle` computes each index by itself, at 15 µs for a small source; this costs 0.1 µs.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, _ORDER, number]))
    return np.argsort(bits.random_raw(length), kind="stable")


def _coins(seed: int, positions: Int[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
    """A fair coin for each of these consecutive positions: position n owns block n of a counter-based stream.

    A block of Philox is four words of 64 bits (Salmon et al. 2011), of which the first one's last bit serves.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, _FLIP])).advance(int(positions[0]))
    return (bits.random_raw(4 * len(positions))[::4] & 1).astype(bool)


def _noise(seed: int, first: int, shape: tuple[int, int, int]) -> Iterator[Float32[np.ndarray, "h w c"]]:
    """Standard normal noise for the positions from `first` on: each owns as many blocks as its numbers need.

    A word of 64 bits gives two numbers (Box and Muller 1958). NumPy promises the words; of the functions of
    them, whose last bits depend on the processor, it promises only that they are near.
    """
    size = math.prod(shape)
    blocks = -(-size // 8)
    bits = np.random.Philox(np.random.SeedSequence([seed, _NOISE])).advance(first * blocks)
    while True:
        words = bits.random_raw(_DRAWN * 4 * blocks).view(np.uint32).astype(np.float32)
        # [images, radius and angle, numbers]; in place, as fresh memory costs as much as arithmetic.
        radius, angle = words.reshape(_DRAWN, 2, -1).swapaxes(0, 1)
        radius += 1
        radius *= np.float32(2**-32)
        np.log(radius, out=radius)
        radius *= -2
        np.sqrt(radius, out=radius)
        angle *= np.float32(2 * math.pi * 2**-32)
        numbers = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        numbers *= radius[:, None]
        yield from numbers.reshape(_DRAWN, -1)[:, :size].reshape(_DRAWN, *shape)
