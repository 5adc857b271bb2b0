"""Writes the files of a latent cache, with all devices of this process."""

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from dig_jax import config
from dig_jax.autoencoder import Autoencoder
from dig_jax.data.encoded import EncodedSource
from dig_jax.data.images import UnreadableImage
from dig_jax.data.latents import Shard, packed
from dig_jax.data.pipeline import read_options
from dig_jax.data.source import Example, Source
from dig_jax.errors import UserError
from dig_jax.files.atomic import write_json
from dig_jax.parallel import batch_sharding, local_mesh, replicated
from dig_jax.progress import Progress

log = logging.getLogger(__name__)

# How many unreadable images are named in the log; the index names all.
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Part:
    """The images first … last - 1 of a split, readable or not, which are one file's."""

    split: str
    number: int
    first: int
    last: int

    @property
    def file(self) -> str:
        """Its path in the cache."""
        return f"{self.split}/{self.number:05}.array_record"

    @property
    def description(self) -> str:
        """The path of what is known of it, once it is finished."""
        return f"{self.split}/{self.number:05}.json"

    def __len__(self) -> int:
        return self.last - self.first


class _Unreadable(NamedTuple):
    name: str
    reason: str


class _Moments(NamedTuple):
    """Of some images as they are and mirrored, unscaled."""

    labels: Int32[np.ndarray, " n"]
    plain: Float32[np.ndarray, "n h w moments"]
    mirrored: Float32[np.ndarray, "n h w moments"]


class ShardWriter:
    """Encodes parts of the sources into files.

    Args:
        directory: of the cache.
        autoencoder: its parameters are copied to all devices of this process.
        sources: of the images, by split.
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
        self._batch_size, self._split = settings.batch_size * mesh.size, batch_sharding(mesh)
        self._autoencoder = autoencoder.on(replicated(mesh))
        self._unreadable = 0

    def write(self, parts: Sequence[Part]) -> None:
        """Writes the files of these parts, one after the other.

        Raises:
            UserError: the disk or the images fail, or the autoencoder gives what is no number.
        """
        done, total = 0, sum(map(len, parts))
        with contextlib.closing(Progress("image", first=0, total=total, every_seconds=30.0)) as progress:
            for part in parts:
                shard = self._write(part, lambda n, done=done: progress.show(done + n))
                write_json(self._directory / part.description, shard._asdict())
                done += len(part)
        if self._unreadable > _NAMED:
            log.warning("%d images could not be read and have no latents", self._unreadable)

    def _write(self, part: Part, show: Callable[[int], None]) -> Shard:
        path = self._directory / part.file
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        unreadable: list[str] = []
        images, sums, squares = 0, 0.0, 0.0
        try:
            with record_file(temporary) as write:
                for labels, *both in self._moments(self._batches(part, unreadable)):
                    stored = self._rounded(np.stack(both, axis=1), part)  # [image, 2, h, w, moments]
                    for label, (plain, mirrored) in zip(labels, stored, strict=True):
                        write(packed(label, plain))
                        write(packed(label, mirrored))
                    mean, logvar = np.split(stored.astype(np.float64), 2, axis=-1)
                    sums += mean.sum((0, 1, 2, 3))
                    squares += (mean**2 + np.exp(logvar)).sum((0, 1, 2, 3))
                    images += len(labels)
                    show(images + len(unreadable))
            size, sha256 = temporary.stat().st_size, file_sha256(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        channels = self._autoencoder.config.latent_channels
        sums, squares = (tuple(np.broadcast_to(total, channels).tolist()) for total in (sums, squares))
        return Shard(part.file, images, size, sha256, tuple(unreadable), sums, squares)

    def _rounded(self, moments: Float32[np.ndarray, "*shape"], part: Part) -> Float[np.ndarray, "*shape"]:
        with np.errstate(over="ignore"):
            stored = moments.astype(self._settings.dtype)
        if not np.isfinite(stored).all():
            raise UserError(
                f"the autoencoder gives moments that are no finite {self._settings.dtype} numbers, for images"
                f" {part.first} to {part.last - 1} of {part.split}: are its weights, config.autoencoder.dtype"
                " and config.encode.dtype right?"
            )
        return stored

    def _batches(self, part: Part, unreadable: list[str]) -> Iterator[list[Example]]:
        """The readable images of a part; the names of the others are noted."""
        source, batch = self._sources[part.split], []
        indices = grain.MapDataset.range(part.first, part.last)
        examples = iter(
            indices.map(lambda i: _read(source, i)).to_iter_dataset(read_options(None, self._batch_size))
        )
        with contextlib.closing(examples):
            for example in examples:
                if isinstance(example, _Unreadable):
                    unreadable.append(example.name)
                    self._tell(example)
                    continue
                batch.append(example)
                if len(batch) == self._batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch

    def _tell(self, image: _Unreadable) -> None:
        self._unreadable += 1
        if self._unreadable <= _NAMED:
            last = "; further ones are named in the index" if self._unreadable == _NAMED else ""
            log.warning("%s is left out: %s%s", image.name, image.reason, last)

    def _moments(self, batches: Iterable[list[Example]]) -> Iterator[_Moments]:
        """Computed while the batch before is written."""
        waiting = None
        for examples in batches:
            labels = np.array([example["label"] for example in examples], np.int32)
            images = self._put(np.stack([example["image"] for example in examples]))
            started = labels, self._autoencoder.encode(images), self._autoencoder.encode(images[:, :, ::-1])
            if waiting:
                yield _fetched(*waiting)
            waiting = started
        if waiting:
            yield _fetched(*waiting)

    def _put(self, images: UInt8[np.ndarray, "n h w c"]) -> UInt8[Array, "batch h w c"]:
        """Images on the devices, filled up with the last one to a whole batch."""
        missing = self._batch_size - len(images)
        return jax.device_put(np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], "edge"), self._split)


def _fetched(labels: Int32[np.ndarray, " n"], plain: Array, mirrored: Array) -> _Moments:
    return _Moments(labels, *(np.asarray(moments)[: len(labels)] for moments in (plain, mirrored)))


def _read(source: Source, index: int) -> Example | _Unreadable:
    if not isinstance(source, EncodedSource):
        return source[index]
    record = source.records.read(index)
    try:
        return source.decoded(record)
    except UnreadableImage as error:
        return _Unreadable(record.name, str(error))


@contextlib.contextmanager
def record_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that appends records to a new file, which is on the disk when the block ends."""
    from array_record.python.array_record_module import ArrayRecordWriter  # not on Windows

    def check(action: Callable[[], object]) -> None:
        try:
            action()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path.parent} cannot be written to: {reason}") from error

    # Uncompressed: numbers like these hardly shrink. Records in groups of one: they are read in any order.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")

    def write(record: bytes) -> None:
        if writer.ok():
            check(lambda: writer.write(record))
        else:  # the writer, which works in the background, tells why when it is closed
            check(writer.close)

    yield write
    check(writer.close)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
