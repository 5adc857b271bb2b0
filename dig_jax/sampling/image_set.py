"""A set of images in one npz file, drawn in chunks.

Finished chunks of FILE.npz are kept in the folder FILE until all are there. FILE.npz appears last, and is
never replaced: it holds a description of what its images depend on.
"""

import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Int32, UInt8

from dig_jax.config import flattened, to_dict
from dig_jax.data.class_names import display_name
from dig_jax.errors import ConfigError, InvalidFile, UserError, naming_directory, naming_setting, one_line
from dig_jax.files.atomic import remove_leftovers, replacing, write_json
from dig_jax.files.json_file import parse_object, read_json
from dig_jax.files.paths import Path, children, delete, make_folder, size
from dig_jax.progress import Progress
from dig_jax.reporting.grids import save_grid
from dig_jax.reporting.pictures import warning_of_failure
from dig_jax.sampling.sampler import Sampler

log = logging.getLogger(__name__)

# Number of images in the grid.
_SHOWN = 100
# Fields of `sampling` that do not affect the images.
_IRRELEVANT = ("every_steps", "images_per_class")
# Fields that sets of earlier versions lack, and what they did.
_LATER = {"uint8": "round"}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """A set of images, with `sampling.batch_size` images per chunk.

    Attributes:
        output: FILE.npz.
        sampler: what draws them.
        labels, seeds: of each image.
    """

    output: Path
    sampler: Sampler
    labels: Int[np.ndarray, " n"]
    seeds: Int[np.ndarray, " n"]

    @property
    def folder(self) -> Path:
        """The folder of the chunks."""
        return self.output.with_suffix("")

    @property
    def grid(self) -> Path:
        """The picture of the first images."""
        return self.output.with_suffix(".png")

    @property
    def chunk_size(self) -> int:
        """Number of images per chunk."""
        return self.sampler.components.config.sampling.batch_size

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the images depend on."""
        components = self.sampler.components
        options = flattened(to_dict(components.config.sampling))
        return {
            "step": self.sampler.step,
            "parameters": components.config.sampled_ema,
            "values of the parameters": _digest(jax.tree.leaves(self.sampler.params)),
            **{name: value for name, value in options.items() if name not in (*_IRRELEVANT, "ema")},
            "values of the weaker model": _digest(jax.tree.leaves(self.sampler.weak_params)),
            "autoencoder": components.autoencoder.fingerprint() if components.autoencoder else "",
            "autoencoder.dtype": components.config.autoencoder.dtype,
            "images": len(self.seeds),
            "labels and seeds": _digest([self.labels, self.seeds]),
        }

    def is_complete(self) -> bool:
        """Return whether the npz file holds this set.

        Raises:
            ConfigError: it holds something else.
        """
        if not self.output.exists():
            return False
        changed = _changed(_stored_identity(self.output), self.identity)
        if changed:
            raise ConfigError(
                f"{self.output} holds another set of images ({changed}); choose another name with"
                " --output=FILE.npz"
            )
        return True

    def claim(self) -> None:
        """Create the folder, or check that it holds chunks of this set.

        Raises:
            UserError: it holds anything else, or is not writable.
        """
        path, identity = self.folder / "set.json", self.identity
        with naming_directory(self.folder):
            remove_leftovers(self.output.parent)
            remove_leftovers(self.folder)
            if path.exists():
                if changed := _changed(_read_identity(path), identity):
                    raise ConfigError(
                        f"{self.folder} contains a different set of images ({changed}); restore those"
                        " settings, delete the directory or choose another name with --output=FILE.npz"
                    )
            elif any(not entry.name.startswith(".") for entry in children(self.folder)):
                raise ConfigError(
                    f"{self.folder} contains other files; choose another name with --output=FILE.npz"
                )
            elif self.grid.exists():
                raise ConfigError(f"{self.grid} exists; choose another name with --output=FILE.npz")
            make_folder(self.folder)
            write_json(path, identity)

    def draw(self, *, index: int, count: int) -> Int32[np.ndarray, " n"]:
        """Draw the missing chunks of process `index` out of `count`; return the evaluations of each image."""
        missing = [
            first for first in range(0, len(self.seeds), self.chunk_size) if not self._is_intact(first)
        ]
        done = len(self.seeds) - sum(len(self.seeds[first : first + self.chunk_size]) for first in missing)
        # Divide by position in the set, not among the missing chunks: other processes may draw already.
        own = [first for first in missing if first // self.chunk_size % count == index]
        if done:
            log.info("%d of %d images already exist", done, len(self.seeds))
        counted = [np.zeros(0, np.int32)]
        with Progress("image", first=done, total=len(self.seeds), every_seconds=10.0) as progress:
            for number, first in enumerate(own, 1):
                chosen = slice(first, first + self.chunk_size)
                with naming_setting("config.sampling"):
                    images, evaluations = self.sampler.counted(self.labels[chosen], seeds=self.seeds[chosen])
                counted.append(evaluations)
                with naming_directory(self.folder), replacing(self._path(first)) as file:
                    file.write(_header(images.shape) + images.tobytes())
                if index == 0:
                    progress.show(min(done + number * count * self.chunk_size, len(self.seeds)))
        return np.concatenate(counted)

    def collect(self, class_names: tuple[str, ...]) -> None:
        """Draw the grid, join the chunks in the npz file, and delete them."""
        with naming_directory(self.output.parent):
            shown = self._first_images()
            if shown.shape[-1] in (1, 3):
                titles = (
                    [display_name(class_names[label]) for label in self.labels[:_SHOWN]]
                    if class_names
                    else ()
                )
                columns = min(len(shown), self.sampler.components.config.sampling.images_per_class)
                with warning_of_failure(self.grid):
                    save_grid(self.grid, shown, columns=columns, titles=titles)
            self._write_npz()
            self.delete()

    def delete(self) -> None:
        """Delete the chunks, then set.json: an interruption never leaves chunks of an unknown set."""
        if not (self.folder / "set.json").exists():
            return
        for path in children(self.folder):
            if path.suffix == ".npy":
                delete(path)
        delete(self.folder)

    def chunks(self) -> Iterator[UInt8[np.ndarray, "n height width channels"]]:
        """Yield the images, chunk by chunk."""
        for first in range(0, len(self.seeds), self.chunk_size):
            if not self._is_intact(first):
                raise UserError(
                    f"{self._path(first)} is missing or corrupt; run the same command to draw it again"
                )
            shape = self._shape(first)
            content = self._path(first).read_bytes()
            yield np.frombuffer(content, np.uint8, offset=len(_header(shape))).reshape(shape)

    def _first_images(self) -> UInt8[np.ndarray, "n height width channels"]:
        shown: list[np.ndarray] = []
        for chunk in self.chunks():
            shown.append(chunk)
            if sum(map(len, shown)) >= _SHOWN:
                break
        return np.concatenate(shown)[:_SHOWN]

    def _write_npz(self) -> None:
        with replacing(self.output) as file, zipfile.ZipFile(file, "w") as archive:
            # Chunk by chunk: np.savez would need all images in memory.
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                member.write(_header((len(self.seeds), *self.sampler.output_shape)))
                for chunk in self.chunks():
                    member.write(chunk.tobytes())
            described = np.array(json.dumps(self.identity))
            for name, values in {"labels": self.labels, "seeds": self.seeds, "set": described}.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.save(member, values)

    def _path(self, first: int) -> Path:
        return self.folder / f"{first:08}.npy"

    def _shape(self, first: int) -> tuple[int, ...]:
        return min(self.chunk_size, len(self.seeds) - first), *self.sampler.output_shape

    def _is_intact(self, first: int) -> bool:
        path, header = self._path(first), _header(shape := self._shape(first))
        try:
            with path.open("rb") as file:
                return file.read(len(header)) == header and size(path) == len(header) + math.prod(shape)
        except FileNotFoundError:
            return False


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an npy file of uint8 images."""
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _digest(arrays: Iterable[Array | np.ndarray]) -> str:
    """Return a hexadecimal hash of the values of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def _changed(stored: dict[str, Any], identity: dict[str, Any]) -> str:
    """Return the differences as "name: old → new"; empty if there are none."""
    stored = _LATER | stored
    changed = [name for name, value in identity.items() if stored.get(name) != value]
    return "; ".join(f"{name}: {stored.get(name)} → {identity[name]}" for name in changed)


def _stored_identity(path: Path) -> dict[str, Any]:
    """Return the identity in an npz file.

    Raises:
        ConfigError: the file has none.
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return parse_object(str(arrays["set"]))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} exists and does not say what it holds: {one_line(error, name_type=True)}; choose another"
            " name with --output=FILE.npz"
        ) from error


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except InvalidFile as error:
        raise UserError(f"cannot read {path}: {error}; delete {path.parent}") from error
