"""The latent cache that --mode=encode writes: its format, and the source that reads it.

    PATH/encoding.json                          header: source and settings of the encoding; written first
    PATH/{train,heldout}/00000.array_record, …  shards: entries 2·i of images, 2·i + 1 mirrored
    PATH/{train,heldout}/00000.json, …          the `Shard` of each finished file
    PATH/index.json                             header and all shards; written last

An entry is the label (int32), then the posterior's means, then its log variances, both [height, width, c],
unscaled, float32 or float16; everything is little-endian.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from dig_jax.config import Config
from dig_jax.data.source import SPLITS, Example, check_label, fingerprint
from dig_jax.errors import ConfigError, InvalidFile, UserError, one_line
from dig_jax.files.download import local_copies
from dig_jax.files.json_file import read_json
from dig_jax.files.paths import Path, absolute, as_os_error, to_path
from dig_jax.files.paths import size as file_size

FORMAT = 1
HEADER_FILE, INDEX_FILE = "encoding.json", "index.json"

_LABEL = np.dtype("<i4")
_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_CONNECTIONS = 16
_MAX_INDEX = 2**26  # bytes; ImageNet's has 100 kB
_REPAIR = "run --mode=encode again, which rewrites corrupt files"


class Shard(NamedTuple):
    """The description of a finished file.

    file: path in the cache, with "/".
    images: number of images, with two entries each.
    bytes: size of the file.
    sha256: hash of its content, in hexadecimal.
    unreadable: names of images that could not be decoded and were skipped.
    sums, squares: sums per channel of the means, and of means² + variances, over all latent pixels.
    """

    file: str
    images: int
    bytes: int
    sha256: str
    unreadable: tuple[str, ...]
    sums: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Shard":
        """Return the shard that JSON describes.

        Raises:
            TypeError, ValueError: invalid fields.
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        shard = cls(**values)
        for items, kind in ((shard.unreadable, str), (shard.sums, float), (shard.squares, float)):
            if not isinstance(items, tuple) or not all(type(item) is kind for item in items):
                raise ValueError(f"invalid unreadable, sums or squares of {shard.file}")
        if not isinstance(shard.file, str) or not isinstance(shard.sha256, str):
            raise ValueError("invalid file or sha256")
        if not re.fullmatch(rf"({'|'.join(SPLITS)})/\d{{5,}}\.array_record", shard.file):
            raise ValueError(f"invalid file name {shard.file!r}")
        if not all(type(size) is int and size >= 0 for size in (shard.images, shard.bytes)):
            raise ValueError(f"invalid sizes of {shard.file}")
        return shard


class Posterior(NamedTuple):
    """An entry: the label of an image, and the moments of its posterior."""

    label: int
    mean: Float32[np.ndarray, "h w c"]
    logvar: Float32[np.ndarray, "h w c"]


def pack(label: int | np.int32, moments: Float[np.ndarray, "h w moments"]) -> bytes:
    """Return the entry for a label and the autoencoder's moments, in float32 or float16."""
    halves = np.split(moments.astype(_DTYPES[moments.dtype.name], copy=False), 2, axis=-1)
    return b"".join([np.asarray(label, _LABEL).tobytes(), *(half.tobytes() for half in halves)])


def checksum(index: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an index without its field "sha256"."""
    fields = {name: value for name, value in index.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentSource:
    """Scaled float32 latents; training draws a new sample from the posterior each time.

    path: directory of the cache.
    shards: the files of this split.
    dtype: dtype of the stored moments.
    scale: factor from the posterior to latents.
    autoencoder: path and fingerprint of the autoencoder that encoded the images.
    encoded_images: size, crop and upright of the images that were encoded; None for sources without them.
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
    encoded_images: Mapping[str, Any]
    name: str = "latents"

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the examples depend on."""
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
        """Return the latents mean + deviation · noise, scaled."""
        label, mean, logvar = self.posterior(index, mirrored)
        image = 0.5 * logvar
        np.exp(image, out=image)
        image *= noise
        image += mean
        image *= self.scale
        return {"image": image, "label": np.int32(label)}

    def posterior(self, index: int, mirrored: bool = False) -> Posterior:
        """Return the unscaled posterior of an image or of its mirror image.

        Raises:
            IndexError: index out of range.
            UserError: the file is corrupt or missing.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for a source of {len(self)} images")
        try:
            entry = self._entries[2 * index + mirrored]
            label = int(np.frombuffer(entry, _LABEL, 1)[0])
            moments = np.frombuffer(entry, self.dtype, offset=_LABEL.itemsize).astype(np.float32, copy=False)
            mean, logvar = moments.reshape(2, *self.image_shape)
        except Exception as error:  # array_record defines no error classes
            reason = one_line(error, name_type=True)
            raise UserError(f"cannot read {self._place(index)}: {reason}; {_REPAIR}") from error
        if not 0 <= label < max(self.num_classes, 1):
            check_label(label, self.num_classes, self._place(index))
        return Posterior(label, mean, logvar)

    @functools.cached_property
    def _entries(self) -> Any:
        """All entries by number; each process opens files on first use, and downloads remote ones before."""
        from grain.sources import ArrayRecordDataSource

        shards = [shard for shard in self.shards if shard.images]
        files = local_copies({self.path / shard.file: shard.sha256 for shard in shards})
        return ArrayRecordDataSource(
            [
                _FileInstruction(str(file), 2 * shard.images, 2 * shard.images)
                for file, shard in zip(files, shards, strict=True)
            ]
        )

    def _place(self, index: int) -> str:
        for shard in self.shards:
            if index < shard.images:
                return f"image {index} of {self.path / shard.file}"
            index -= shard.images
        raise AssertionError("index is below len")


@dataclasses.dataclass
class _FileInstruction:
    """All entries of a file. Their number is given, so array_record need not open the file to count them."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


def latents(
    split: str,
    path: str = "",
    image_size: int | tuple[int, int] = -1,
    channels: int = -1,
    num_classes: int = -1,
) -> LatentSource:
    """Open a latent cache that --mode=encode wrote.

    Args:
        split: "train" or "heldout".
        path: directory of the cache.
        image_size: expected height and width of the latents, or one number for both; -1: not checked.
        channels: expected channels of the latents; -1: not checked.
        num_classes: expected number of classes; -1: not checked.

    Raises:
        UserError: the cache is missing, unfinished, corrupt, or not as expected.
        ValueError: an invalid option.
    """
    if not path:
        raise ValueError("missing path of the latents source; expected a directory written by --mode=encode")
    directory = absolute(to_path(path))
    index = _read(directory)
    try:
        height, width, depth = map(int, index["latents"]["shape"])
        source = LatentSource(
            split=split,
            path=directory,
            shards=tuple(map(Shard.from_dict, index["splits"][split])),
            image_shape=(height, width, depth),
            dtype=_DTYPES[index["latents"]["dtype"]],
            scale=np.float32(index["autoencoder"]["scaling_factor"]),
            class_names=tuple(map(str, index["class_names"])),
            flip=bool(index["flip"]),
            autoencoder={name: str(index["autoencoder"][name]) for name in ("path", "fingerprint")},
            encoded_images={name: index["pictures"][name] for name in ("size", "crop", "upright")},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = one_line(error, name_type=True)
        raise UserError(f"{directory / INDEX_FILE} is corrupt: {reason}; {_REPAIR}") from error
    found = {"image_size": (height, width), "channels": depth, "num_classes": source.num_classes}
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    expected = {"image_size": size, "channels": channels, "num_classes": num_classes}
    for name, value in expected.items():
        if value not in (-1, (-1, -1), found[name]):
            raise UserError(
                f"the latents in {directory} have {name}={_format(found[name])};"
                f" expected config.data.options.{name}={_format(value)}"
            )
    with ThreadPoolExecutor(_CONNECTIONS) as pool:  # in object storage each size is a request
        list(pool.map(lambda shard: _check_size(directory / shard.file, shard.bytes), source.shards))
    return source


def check_latents(source: LatentSource, settings: Config, fingerprint: str | None) -> None:
    """Raise unless a cache has the autoencoder and image options of a config.

    Args:
        source: the latents.
        settings: `encode.options` that the cache knows are compared.
        fingerprint: fingerprint of the config's autoencoder; None without one.

    Raises:
        ConfigError: they differ; the message names the difference.
    """
    encoder, stored = source.autoencoder, source.encoded_images
    if fingerprint is not None and fingerprint != encoder["fingerprint"]:
        raise ConfigError(
            f"the latents in {source.path} were encoded by a different autoencoder: got fingerprint"
            f" {encoder['fingerprint'][:12]} ({encoder['path']}); expected {fingerprint[:12]}"
            f" (config.autoencoder.path={settings.autoencoder.path})"
        )
    for name, value in settings.encode.options.items():
        if name == "image_size":
            name, value = "size", [value, value] if isinstance(value, int) else list(value)
        if stored.get(name) not in (None, value):
            raise ConfigError(
                f"the latents in {source.path} were encoded with {name}={_format(stored[name])};"
                f" expected {_format(value)} (config.encode.options)"
            )


def _read(directory: Path) -> dict[str, Any]:
    """Read the index and check format and checksum."""
    path = directory / INDEX_FILE
    if not path.exists():
        if (directory / HEADER_FILE).exists():
            raise UserError(
                f"the latents in {directory} are incomplete; run --mode=encode again to finish them"
            )
        raise UserError(f"no latents in {directory}; run --mode=encode first (docs/guide/latents.md)")
    try:
        index = read_json(path, max_bytes=_MAX_INDEX)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except InvalidFile as error:
        raise UserError(f"{path} is corrupt: {error}; {_REPAIR}") from error
    if index.get("sha256") != checksum(index):
        raise UserError(f"{path} is corrupt: checksum mismatch; {_REPAIR}")
    if index.get("format") != FORMAT:
        raise UserError(f"unsupported format of {path}: got {index.get('format')}; expected {FORMAT}")
    return index


def _check_size(path: Path, size: int) -> None:
    try:
        with as_os_error(path):
            actual = file_size(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or one_line(error)}; {_REPAIR}") from error
    if actual != size:
        raise UserError(f"{path} has {actual:,} bytes; expected {size:,}; {_REPAIR}")


def _format(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
