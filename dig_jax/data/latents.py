"""Latents that --mode=encode has stored: the source, and the format that reader and writer share.

    PATH/encoding.json                  what is encoded, and how; written first
    PATH/{train,heldout}/00000.array_record, …    two records per image: 2·i as it is, 2·i + 1 mirrored
    PATH/{train,heldout}/00000.json, …  beside each finished file: its `Shard`
    PATH/index.json                     all of this; written last

A record is the label (int32), then the posterior's means and then its log variances, each [height, width, c],
unscaled, float32 or float16; all little-endian.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from dig_jax.config import Config
from dig_jax.data.source import SPLITS, Example, fingerprint
from dig_jax.errors import ConfigError, UserError

FORMAT = 1
BEGUN, INDEX = "encoding.json", "index.json"

_LABEL = np.dtype("<i4")
_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_MAX_INDEX = 2**26  # bytes; that of ImageNet has 100 kB
_AGAIN = "run --mode=encode again, which writes damaged files anew"


class Shard(NamedTuple):
    """What is known of a finished file.

    file: its path in the cache, with "/".
    images: how many it has, with two records each.
    bytes: its size.
    sha256: of its content, in hex.
    unreadable: names of images that could not be decoded, and are not in it.
    sums, squares: over all latent pixels, of the means and of the means² + variances, per channel.
    """

    file: str
    images: int
    bytes: int
    sha256: str
    unreadable: tuple[str, ...]
    sums: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Shard":
        """The shard that JSON describes.

        Raises:
            TypeError, ValueError: it describes none.
        """
        shard = cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()})
        if not re.fullmatch(rf"({'|'.join(SPLITS)})/\d{{5,}}\.array_record", shard.file):
            raise ValueError(f"{shard.file!r} is no file's name")
        if not all(type(size) is int and size >= 0 for size in (shard.images, shard.bytes)):
            raise ValueError(f"the sizes of {shard.file} are no numbers")
        return shard


class Posterior(NamedTuple):
    """A record: the class of an image, and its moments."""

    label: int
    mean: Float32[np.ndarray, "h w c"]
    logvar: Float32[np.ndarray, "h w c"]


def packed(label: int | np.int32, moments: Float[np.ndarray, "h w moments"]) -> bytes:
    """A record of moments as the autoencoder gives them, in float32 or float16."""
    halves = np.split(moments.astype(_DTYPES[moments.dtype.name], copy=False), 2, axis=-1)
    return b"".join([np.asarray(label, _LABEL).tobytes(), *(half.tobytes() for half in halves)])


def checksum(index: Mapping[str, Any]) -> str:
    """SHA-256 of an index but for its own "sha256"."""
    fields = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentSource:
    """Latents of images: float32, scaled; a fresh draw from the posterior each time in training.

    path: the cache's directory.
    shards: the files of this split.
    dtype: of the numbers in them.
    scale: of latents, in the posterior's units.
    autoencoder: path and fingerprint of the one that made them.
    pictures: size, crop and upright of what it was given; None where there was none of these.
    """

    split: str
    path: Path
    shards: tuple[Shard, ...]
    image_shape: tuple[int, int, int]
    dtype: np.dtype
    scale: np.float32
    class_names: tuple[str, ...]
    flip: bool
    autoencoder: Mapping[str, str]
    pictures: Mapping[str, Any]
    name: str = "latents"

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that an example of this source depends on."""
        files = [shard.sha256 for shard in self.shards]
        return fingerprint(self.name, self.split, files, self.class_names, float(self.scale))

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def _length(self) -> int:
        return sum(shard.images for shard in self.shards)

    def __getitem__(self, index: int) -> Example:
        posterior = self.posterior(index)
        return {"image": posterior.mean * self.scale, "label": np.int32(posterior.label)}

    def draw(self, index: int, mirrored: bool, noise: Float32[np.ndarray, "h w c"]) -> Example:
        """The latents mean + deviation · noise."""
        label, mean, logvar = self.posterior(index, mirrored)
        image = 0.5 * logvar
        np.exp(image, out=image)
        image *= noise
        image += mean
        image *= self.scale
        return {"image": image, "label": np.int32(label)}

    def posterior(self, index: int, mirrored: bool = False) -> Posterior:
        """What the autoencoder said of an image, unscaled.

        Raises:
            IndexError: 0 ≤ index < len is not so.
            UserError: the file is damaged or gone.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a source of {len(self)} images")
        try:
            record = self._records[2 * index + mirrored]
            label = int(np.frombuffer(record, _LABEL, 1)[0])
            moments = np.frombuffer(record, self.dtype, offset=_LABEL.itemsize).astype(np.float32, copy=False)
            return Posterior(label, *moments.reshape(2, *self.image_shape))
        except Exception as error:  # array_record has no errors of its own
            raise UserError(
                f"{self._place(index)} cannot be read ({_first_line(error)}); {_AGAIN}"
            ) from error

    @functools.cached_property
    def _records(self) -> Any:
        """All records by number; files are opened when they are first read, in each process."""
        from grain.sources import ArrayRecordDataSource

        parts = [
            _Part(str(self.path / shard.file), 2 * shard.images) for shard in self.shards if shard.images
        ]
        return ArrayRecordDataSource(parts)

    def _place(self, index: int) -> str:
        for shard in self.shards:
            if index < shard.images:
                return f"{self.path / shard.file}: image {index}"
            index -= shard.images
        raise AssertionError("index is below len")


@dataclasses.dataclass(frozen=True)
class _Part:
    """All records of a file, told to array_record so that it need not open it."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def latents(
    split: str, path: str = "", image_size: int = -1, channels: int = -1, num_classes: int = -1
) -> LatentSource:
    """The latents that --mode=encode has written.

    Args:
        split: "train" or "heldout".
        path: the directory.
        image_size: height and width of the latents, to be checked; -1: as they are, as for the next two.
        channels: of the latents.
        num_classes: number of labels.

    Raises:
        UserError: there are none, or they are unfinished, damaged, or others than expected.
        ValueError: a setting that cannot be.
    """
    if not path:
        raise ValueError("path of the latents source is missing: the directory that --mode=encode wrote")
    directory = Path(path).expanduser().absolute()
    index = _read(directory)
    try:
        height, width, depth = map(int, index["latents"]["shape"])
        source = LatentSource(
            split=split,
            path=directory,
            shards=tuple(map(Shard.of, index["splits"][split])),
            image_shape=(height, width, depth),
            dtype=_DTYPES[index["latents"]["dtype"]],
            scale=np.float32(index["autoencoder"]["scaling_factor"]),
            class_names=tuple(map(str, index["class_names"])),
            flip=bool(index["flip"]),
            autoencoder={name: str(index["autoencoder"][name]) for name in ("path", "fingerprint")},
            pictures={name: index["pictures"][name] for name in ("size", "crop", "upright")},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / INDEX} is damaged ({_first_line(error)}); {_AGAIN}") from error
    found = {"image_size": (height, width), "channels": depth, "num_classes": source.num_classes}
    wanted = {"image_size": (image_size, image_size), "channels": channels, "num_classes": num_classes}
    for name, value in wanted.items():
        if value not in (-1, (-1, -1), found[name]):
            raise UserError(
                f"the latents in {directory} have {name}={_written(found[name])}, not {_written(value)}"
            )
    for shard in source.shards:
        _check_size(directory / shard.file, shard.bytes)
    return source


def check_latents(source: LatentSource, settings: Config, fingerprint: str | None) -> None:
    """Raises unless the latents are those that a config describes.

    Args:
        source: the latents.
        settings: `encode.options` are compared as far as they are set.
        fingerprint: of the autoencoder that the config names; None: it names none.

    Raises:
        ConfigError: says what differs.
    """
    encoder, known = source.autoencoder, source.pictures
    if fingerprint not in (None, encoder["fingerprint"]):
        raise ConfigError(
            f"the latents in {source.path} were made by another autoencoder ({encoder['path']}, fingerprint"
            f" {encoder['fingerprint'][:12]}) than config.autoencoder.path={settings.autoencoder.path}"
            f" ({fingerprint[:12]}), which could not decode what a model learns of them"
        )
    for name, value in settings.encode.options.items():
        if name == "image_size":
            name, value = "size", [value, value] if isinstance(value, int) else list(value)
        if known.get(name) not in (None, value):
            raise ConfigError(
                f"the latents in {source.path} were made with {name}={_written(known[name])}, not"
                f" {_written(value)}, as config.encode.options has it"
            )


def _read(directory: Path) -> dict[str, Any]:
    """The index, of this version and as it was written."""
    path = directory / INDEX
    if not path.exists():
        if (directory / BEGUN).exists():
            raise UserError(f"the latents in {directory} are unfinished: --mode=encode goes on with them")
        raise UserError(f"there are no latents in {directory}: --mode=encode makes them (docs/latents.md)")
    try:
        with path.open("rb") as file:
            index = json.loads(file.read(_MAX_INDEX))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({_first_line(error)}); {_AGAIN}") from error
    if not isinstance(index, dict) or index.get("sha256") != checksum(index):
        raise UserError(f"{path} is damaged: it is not what its checksum says; {_AGAIN}")
    if index.get("format") != FORMAT:
        raise UserError(f"{path} is of format {index.get('format')}, this program reads format {FORMAT}")
    return index


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {_AGAIN}") from error
    if actual != size:
        raise UserError(f"{path} has {actual:,} bytes, but should have {size:,}; {_AGAIN}")


def _written(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
