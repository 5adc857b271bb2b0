"""Encode images on all devices of this process and write the files of a latent cache."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, UInt8

from dig_jax import config
from dig_jax.autoencoder import Autoencoder
from dig_jax.autoencoder.model import encode_images
from dig_jax.data.encoded import EncodedSource
from dig_jax.data.images import UnreadableImage
from dig_jax.data.latents import Shard, pack
from dig_jax.data.pipeline import read_options
from dig_jax.data.source import Example, Source
from dig_jax.errors import UserError, one_line
from dig_jax.files.atomic import temporary_name, write_json
from dig_jax.files.paths import Path, is_remote, sha256, upload
from dig_jax.parallel import batch_sharding, local_mesh, replicated
from dig_jax.progress import Progress

log = logging.getLogger(__name__)

# Log this many unreadable images by name; the index lists all of them.
_LOGGED = 10


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Images first … last - 1 of a split, readable or not, whose latents form one file."""

    split: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        """Path of the file in the cache."""
        return f"{self.split}/{self.number:05}.array_record"

    @property
    def description(self) -> str:
        """Path of the JSON description of the finished file."""
        return f"{self.split}/{self.number:05}.json"

    def __len__(self) -> int:
        return self.last - self.first


class Unreadable(NamedTuple):
    """An image that cannot be decoded, with the reason."""

    name: str
    reason: str


class _Moments(NamedTuple):
    """Unscaled moments of some images and of their mirror images."""

    labels: Int32[np.ndarray, " n"]
    plain: Float32[np.ndarray, "n h w moments"]
    mirrored: Float32[np.ndarray, "n h w moments"]


class ShardWriter:
    """Writer of the files of a latent cache.

    Args:
        directory: directory of the cache.
        autoencoder: its parameters are copied to all devices of this process.
        sources: the images by split.
        settings: batch size and dtype.
    """

    def __init__(
        self,
        directory: Path,
        autoencoder: Autoencoder,
        sources: Mapping[str, Source],
        settings: config.EncodeConfig,
    ):
        self._directory, self._sources, self._settings = directory, sources, settings
        mesh = local_mesh()
        self._batch_size, self._sharding = settings.batch_size * mesh.size, batch_sharding(mesh)
        graphdef, params = nnx.split(autoencoder)  # once: it takes longer than encoding a small batch
        self._encode = functools.partial(encode_images, graphdef, jax.device_put(params, replicated(mesh)))
        self._channels = autoencoder.config.latent_channels
        self._unreadable = 0

    def write(self, chunks: Sequence[Chunk], check: Callable[[], None] = lambda: None) -> None:
        """Write the files of some chunks, one after the other; call `check` after each batch.

        Raises:
            UserError: an unreadable source, a full disk, or non-finite moments.
        """
        done, total = 0, sum(map(len, chunks))
        with Progress("image", first=0, total=total, every_seconds=30.0) as progress:
            for chunk in chunks:

                def show(count: int, done: int = done) -> None:
                    check()
                    progress.show(done + count)

                shard = self._write(chunk, show)
                write_json(self._directory / chunk.description, shard._asdict())
                done += len(chunk)
        if self._unreadable > _LOGGED:
            log.warning("skipped %d unreadable images", self._unreadable)

    def _write(self, chunk: Chunk, show: Callable[[int], None]) -> Shard:
        path = self._directory / chunk.file
        unreadable: list[str] = []
        images, sums, squares = 0, 0.0, 0.0
        with _new_file(path) as temporary:
            with array_record_writer(temporary) as write:
                for labels, *both in self._moments(self._batches(chunk, unreadable)):
                    stored = self._cast(np.stack(both, axis=1), chunk)  # [image, 2, h, w, moments]
                    for label, (plain, mirrored) in zip(labels, stored, strict=True):
                        write(pack(label, plain))
                        write(pack(label, mirrored))
                    mean, logvar = np.split(stored.astype(np.float64), 2, axis=-1)
                    sums += mean.sum((0, 1, 2, 3))
                    squares += (mean**2 + np.exp(logvar)).sum((0, 1, 2, 3))
                    images += len(labels)
                    show(images + len(unreadable))
            size, digest = temporary.stat().st_size, sha256(temporary)
        sums, squares = (tuple(np.broadcast_to(total, self._channels).tolist()) for total in (sums, squares))
        return Shard(chunk.file, images, size, digest, tuple(unreadable), sums, squares)

    def _cast(self, moments: Float32[np.ndarray, "*shape"], chunk: Chunk) -> Float[np.ndarray, "*shape"]:
        with np.errstate(over="ignore"):
            stored = moments.astype(self._settings.dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"non-finite moments in {self._settings.dtype} for images {chunk.first} to {chunk.last - 1}"
                f" of split {chunk.split!r}; check the autoencoder's weights, config.autoencoder.dtype and"
                " config.encode.dtype"
            )
        return stored

    def _batches(self, chunk: Chunk, unreadable: list[str]) -> Iterator[list[Example]]:
        """Yield the readable images of a chunk; add the names of the others to `unreadable`."""
        source, batch = self._sources[chunk.split], []
        indices = grain.MapDataset.range(chunk.first, chunk.last)
        examples = iter(
            indices.map(lambda i: read_image(source, i)).to_iter_dataset(read_options(None, self._batch_size))
        )
        with contextlib.closing(examples):
            for example in examples:
                if isinstance(example, Unreadable):
                    unreadable.append(example.name)
                    self._log_unreadable(example)
                    continue
                batch.append(example)
                if len(batch) == self._batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _log_unreadable(self, image: Unreadable) -> None:
        self._unreadable += 1
        if self._unreadable <= _LOGGED:
            last = "; the index names further ones" if self._unreadable == _LOGGED else ""
            log.warning("skipped unreadable image %s: %s%s", image.name, image.reason, last)

    def _moments(self, batches: Iterable[list[Example]]) -> Iterator[_Moments]:
        """Yield moments; each batch is computed while the previous one is written."""
        previous = None
        for examples in batches:
            labels = np.array([example["label"] for example in examples], np.int32)
            images = self._put(np.stack([example["image"] for example in examples]))
            started = labels, self._encode(images), self._encode(images[:, :, ::-1])
            if previous:
                yield _fetch(*previous)
            previous = started
        if previous:
            yield _fetch(*previous)

    def _put(self, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[Array, "batch h w c"]:
        """Pad images to a full batch with the last one, and transfer them to the devices."""
        missing = self._batch_size - len(images)
        return jax.device_put(np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], "edge"), self._sharding)


def _fetch(labels: Int32[np.ndarray, " n"], plain: Array, mirrored: Array) -> _Moments:
    return _Moments(labels, *(np.asarray(moments)[: len(labels)] for moments in (plain, mirrored)))


def read_image(source: Source, index: int) -> Example | Unreadable:
    """Return an image of a source, without replacing it if it is unreadable."""
    if not isinstance(source, EncodedSource):
        return source[index]
    image = source.images.read(index)
    try:
        return source.decode(image)
    except UnreadableImage as error:
        return Unreadable(image.name, str(error))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[pathlib.Path]:
    """Yield the name of a local file that becomes `path` when the block ends; an error deletes it instead."""
    with contextlib.ExitStack() as stack:
        if is_remote(path):
            temporary = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()), path.name)
        else:
            temporary = temporary_name(pathlib.Path(path))
        stack.callback(temporary.unlink, missing_ok=True)
        yield temporary
        if is_remote(path):
            upload(temporary, path)
        else:
            os.replace(temporary, path)


@contextlib.contextmanager
def array_record_writer(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """Yield a function that appends entries to a new file, which is synced to disk on exit.

    Raises:
        UserError: the file could not be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter  # not available on Windows

    def check(action: Callable[[], object]) -> None:
        try:
            action()
        except RuntimeError as error:
            raise UserError(f"cannot write to {path.parent}: {one_line(error)}") from error

    # Uncompressed, since noise does not shrink; groups of one entry, since they are read in random order.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")

    def write(entry: bytes) -> None:
        if writer.ok():
            check(lambda: writer.write(entry))
        else:  # the writer works in the background and gives the reason when it is closed
            check(writer.close)

    yield write
    check(writer.close)
    with path.open("rb") as file:
        os.fsync(file.fileno())
