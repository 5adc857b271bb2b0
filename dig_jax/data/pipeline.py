"""Endless training batches that resume exactly, and single passes for evaluation.

The n-th example of a run, counted over all processes, is a function of (seed, n): its epoch is
n // len(source), each epoch has a different permutation, and n selects the random bits for its flip and, for
latents, for its sample from the posterior. So `start=n` resumes a run exactly, with any batch size and any
number of processes. docs/guide/data.md explains why these are not grain's `shuffle` and `random_map`.
"""

import math
import os
import sys
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from dig_jax.data.buckets import Buckets
from dig_jax.data.features import StoredFeatures
from dig_jax.data.order import FLIP, NOISE, Shuffled
from dig_jax.data.source import Example, Source

Batch = dict[str, np.ndarray]

# Draw the noise of this many images at once: fewer NumPy calls mean fewer switches between threads.
_NOISE_IMAGES = 8


@runtime_checkable
class RandomSource(Protocol):
    """A source whose training examples are random samples; `source[index]` is their mean."""

    def draw(self, index: int, mirrored: bool, noise: Float32[np.ndarray, "h w c"]) -> Example:
        """Return a sample with a float32 image.

        Args:
            index: index of the example.
            mirrored: whether to mirror it left to right.
            noise: standard normal noise of the image's shape.
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
    features: StoredFeatures | None = None,
    features_end: int | None = None,
    buckets: Buckets | None = None,
    num_threads: int | None = None,
    prefetch: int = 8,
) -> grain.DatasetIterator[Batch]:
    """Return this process's shard of endless training batches.

    Batch j holds examples start + j·batch_size … start + (j+1)·batch_size - 1 of the run, and process p
    reads the p-th contiguous shard of it. Epochs follow each other without a gap, so a batch may span them.

    Args:
        source: the examples.
        batch_size: images per step over all processes.
        seed: non-negative seed of order, flips and samples.
        start: examples consumed so far by all processes.
        process_index: index of this shard, from 0.
        process_count: number of shards.
        flip: whether to mirror half of the images left to right, if `source.flip` allows it.
        features: features of the source's images, which join the batches.
        features_end: number of examples of the run after which features are zeros, which are not read.
        buckets: they choose the images and the size of each batch; `start` is a number of whole batches.
        num_threads: batches computed at the same time; 0: none ahead of time. By default one thread per
            core, from 4 to 32, since Pillow releases the GIL; one thread for a `RandomSource`, whose short
            NumPy calls only compete for the GIL.
        prefetch: batches computed ahead of time, or num_threads if that is more.

    Returns:
        An iterator of {"image": float32 [b, h, w, c], "label": int32 [b]}, b = batch_size / process_count,
        and with features also "features": float16 [b, rows, columns, channels], of the mirror image if the
        image is mirrored. Pixels are in [-1, 1], latents are new samples. `close()` ends its threads.

    Raises:
        ValueError: invalid arguments.
    """
    shard_size = _shard_size(source, batch_size, process_index, process_count)
    if seed < 0 or start < 0:
        raise ValueError(f"invalid seed={seed} or start={start}; expected at least 0")
    if buckets is not None and (buckets.batch_size != batch_size or start % batch_size):
        raise ValueError(
            f"invalid batch_size={batch_size} or start={start}; expected whole batches of buckets"
        )
    mirror, order = flip and source.flip, Shuffled(len(source), seed)

    def load(first: int) -> Batch:
        positions = np.arange(first, first + shard_size)
        if buckets is not None:
            images, indices = buckets.choose(first, shard_size)
        else:
            images, indices = source, order.at(positions)
        mirrored = _flips(seed, positions) if mirror else np.zeros(shard_size, bool)
        if isinstance(images, RandomSource):
            noise = _noise(seed, first, images.image_shape)
            arguments = zip(indices.tolist(), mirrored.tolist(), noise, strict=False)
            batch = _stack([images.draw(*one) for one in arguments])
        else:
            batch = _stack([images[index] for index in indices.tolist()])
            batch["image"][mirrored] = batch["image"][mirrored, :, ::-1]
        if features is None:
            return batch
        if features_end is not None and first >= features_end:
            return {**batch, "features": np.zeros((shard_size, *features.shape), np.float16)}
        return {**batch, "features": features.read(indices, mirrored)}

    firsts = grain.MapDataset.range(start + process_index * shard_size, sys.maxsize, batch_size)
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
    """Return this process's shard of one pass over a source, in order and in batches of one shape.

    The last batch is padded with the last image; `mask` is False for padding. All processes get the same
    number of batches.

    Args:
        source: the examples.
        batch_size: images per step over all processes.
        process_index: index of this shard, from 0.
        process_count: number of shards.
        num_threads: as in `batches`.
        prefetch: as in `batches`.

    Returns:
        An iterator of {"image": float32 [b, h, w, c], "label": int32 [b], "mask": bool [b]}. Pixels are in
        [-1, 1], latents are means.

    Raises:
        ValueError: invalid arguments.
    """
    shard_size = _shard_size(source, batch_size, process_index, process_count)

    def load(first: int) -> Batch:
        indices = np.arange(first, first + shard_size)
        batch = _stack([source[index] for index in np.minimum(indices, len(source) - 1).tolist()])
        return {**batch, "mask": indices < len(source)}

    offset = process_index * shard_size
    firsts = grain.MapDataset.range(offset, len(source) + offset, batch_size)
    return iter(firsts.map(load).to_iter_dataset(_read_options(source, num_threads, prefetch)))


def normalize(images: UInt8[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Map pixels 0…255 to -1…1."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _usable_cores() -> int:
    """Return the number of cores that this process may use, or on macOS and Windows of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_options(source: Source, num_threads: int | None, prefetch: int) -> grain.ReadOptions:
    if num_threads is None and isinstance(source, RandomSource):
        num_threads = 1
    return read_options(num_threads, prefetch)


def read_options(num_threads: int | None, prefetch: int) -> grain.ReadOptions:
    """Return grain's options for the arguments of `batches`."""
    if num_threads is None:
        num_threads = min(max(_usable_cores(), 4), 32)
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads))


def _shard_size(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    """Return the size of a shard of a batch, after checking the arguments."""
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"invalid process_index={process_index}; expected 0 to process_count - 1 = {process_count - 1}"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"invalid batch_size={batch_size}; expected a positive multiple of the {process_count} processes"
        )
    if not len(source):
        raise ValueError(f"no images in the {source.split!r} split of data source {source.name!r}")
    return batch_size // process_count


def _stack(examples: list[Example]) -> Batch:
    images = np.stack([example["image"] for example in examples])
    return {
        "image": normalize(images) if images.dtype == np.uint8 else images,
        "label": np.array([example["label"] for example in examples], np.int32),
    }


def _flips(seed: int, positions: Int[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
    """Return a fair coin for each of some consecutive positions.

    Position n uses the last bit of block n of a Philox stream, four words of 64 bits (Salmon et al. 2011).
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, FLIP])).advance(int(positions[0]))
    return (bits.random_raw(4 * len(positions))[::4] & 1).astype(bool)


def _noise(seed: int, first: int, shape: tuple[int, int, int]) -> Iterator[Float32[np.ndarray, "h w c"]]:
    """Yield standard normal noise for the positions from `first` on.

    Each position uses the number of Philox blocks that its image needs; a word of 64 bits yields two numbers
    (Box and Muller 1958). NumPy promises never to change the words, but the last bits of log, cos and sin
    depend on the processor.
    """
    size = math.prod(shape)
    blocks = -(-size // 8)
    bits = np.random.Philox(np.random.SeedSequence([seed, NOISE])).advance(first * blocks)
    while True:
        words = bits.random_raw(_NOISE_IMAGES * 4 * blocks).view(np.uint32).astype(np.float32)
        # [images, radius and angle, numbers]; in place, since new memory costs as much as the arithmetic.
        radius, angle = words.reshape(_NOISE_IMAGES, 2, -1).swapaxes(0, 1)
        radius += 1
        radius *= np.float32(2**-32)
        np.log(radius, out=radius)
        radius *= -2
        np.sqrt(radius, out=radius)
        angle *= np.float32(2 * math.pi * 2**-32)
        numbers = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        numbers *= radius[:, None]
        yield from numbers.reshape(_NOISE_IMAGES, -1)[:, :size].reshape(_NOISE_IMAGES, *shape)
