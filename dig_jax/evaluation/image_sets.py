"""Sets of images to score or to compare with: a folder, an npz file, or the images of a data source.

All are read in parts, so that a set may be larger than the memory.
"""

import abc
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import cast

import numpy as np
from jaxtyping import Int, UInt8

from dig_jax.data.encoded import EncodedImages
from dig_jax.data.image_folder import image_folder
from dig_jax.data.images import MODES, UnreadableImage, adm_crop, decode
from dig_jax.data.source import Source
from dig_jax.errors import UserError, one_line
from dig_jax.files.paths import Path, to_path
from dig_jax.parallel import own_share

Shape = tuple[int, int, int]
# Indices of images in a set, and the images.
Part = tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, "n h w c"]]

# Threads that decode images; Pillow releases the GIL.
_THREADS = min(os.cpu_count() or 1, 32)


class Images(abc.ABC):
    """Images of one shape, with 1 or 3 channels."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Where the images are, for messages and for the record of a score."""

    @property
    @abc.abstractmethod
    def shape(self) -> Shape:
        """(height, width, channels)."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal hash of what the images are."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def parts(self, first: int, size: int, stop: int) -> Iterator[Part]:
        """Yield indices and images first … stop - 1, `size` at a time.

        Of each part, a process yields its `own_share`, which may be empty.

        Raises:
            UserError: an image is unreadable or has another shape.
        """


@dataclasses.dataclass(frozen=True)
class NpzImages(Images):
    """Images `arr_0` of an npz file, uint8 [n, height, width, 1 or 3], as --mode=sample writes them."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @functools.cached_property
    def _header(self) -> tuple[int, ...]:
        with npz_member(self.path, "arr_0") as member:
            return _npy_shape(member, self.name)

    @property
    def shape(self) -> Shape:
        """(height, width, channels)."""
        _, height, width, channels = self._header
        return height, width, channels

    @property
    def fingerprint(self) -> str:
        """Hash of the shape and of the checksum that the zip file stores."""
        with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
            text = f"{self._header} {archive.getinfo('arr_0.npy').CRC}"
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return self._header[0]

    def parts(self, first: int, size: int, stop: int) -> Iterator[Part]:
        """Yield images first … stop - 1, `size` at a time, from one pass over the file."""
        image_size = int(np.prod(self.shape))
        with npz_member(self.path, "arr_0") as member:
            _npy_shape(member, self.name)
            position = 0
            for start in range(first, stop, size):
                own = own_share(start, min(start + size, stop))
                member.seek((own.start - position) * image_size, os.SEEK_CUR)
                position = own.stop
                content = member.read(len(own) * image_size)
                if len(content) < len(own) * image_size:
                    raise UserError(f"damaged {self.name}: the images end early; write or download it again")
                yield np.array(own, int), np.frombuffer(content, np.uint8).reshape(len(own), *self.shape)


@contextlib.contextmanager
def npz_member(path: Path, name: str) -> Iterator[zipfile.ZipExtFile]:
    """Open an array of an npz file to read in order.

    Raises:
        UserError: the file is damaged or has no such array.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            if f"{name}.npy" not in archive.namelist():
                names = ", ".join(member.removesuffix(".npy") for member in archive.namelist()[:8])
                raise UserError(f"no images in {path}: got {names or 'no arrays'}; expected the array {name}")
            with archive.open(f"{name}.npy") as member:
                yield cast(zipfile.ZipExtFile, member)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"damaged {path}: {one_line(error)}; write or download it again") from error


def _npy_shape(member: zipfile.ZipExtFile, name: str) -> tuple[int, ...]:
    """Read the header of an array of images and return its shape."""
    try:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(member)
    except (ValueError, EOFError) as error:
        raise UserError(f"damaged {name}: {one_line(error)}; download it again") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in MODES or fortran:
        order = " in Fortran order" if fortran else ""
        raise UserError(
            f"unsupported images in {name}: got {dtype} {list(shape)}{order}; expected uint8"
            " [n, height, width, 1 or 3] in C order"
        )
    return shape


@dataclasses.dataclass(frozen=True)
class FolderImages(Images):
    """Images in a folder and its subfolders, in the order of their paths.

    Attributes:
        path: the folder.
        wanted: the shape to crop to, as ADM crops training images; None: all images have the size of the
            first one.
    """

    path: Path
    wanted: Shape | None = None

    @property
    def name(self) -> str:
        """The path, and how images are cropped."""
        return (
            f"{self.path} (cropped as by ADM to {self.wanted[0]}×{self.wanted[1]})"
            if self.wanted
            else str(self.path)
        )

    @functools.cached_property
    def _images(self) -> EncodedImages:
        return image_folder("train", str(self.path), heldout_fraction=0.0).images

    @property
    def shape(self) -> Shape:
        """(height, width, channels)."""
        return self.wanted or self._first_shape

    @functools.cached_property
    def _first_shape(self) -> Shape:
        height, width, channels = self._decode(0, None).shape
        return height, width, channels

    @property
    def fingerprint(self) -> str:
        """Hash of paths, sizes and the crop."""
        return hashlib.sha256(f"{self._images.identity} {self.wanted}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def parts(self, first: int, size: int, stop: int) -> Iterator[Part]:
        """Yield images first … stop - 1, `size` at a time, decoded by several threads."""
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            for start in range(first, stop, size):
                own = own_share(start, min(start + size, stop))
                decoded = list(threads.map(functools.partial(self._decode, shape=self.shape), own))
                yield np.array(own, int), np.array(decoded, np.uint8).reshape(len(own), *self.shape)

    def _decode(self, index: int, shape: Shape | None) -> UInt8[np.ndarray, "h w c"]:
        encoded = self._images.read(index)
        try:
            image = decode(encoded.data, channels=shape[2] if shape else 3)
            if self.wanted:
                return adm_crop(image, self.wanted[:2])
        except UnreadableImage as error:
            raise UserError(f"cannot read {encoded.name}: {error}") from error
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        if shape and pixels.shape != shape:
            raise UserError(
                f"images of different sizes in {self.path}: got {image.height}×{image.width} in"
                f" {encoded.name}; expected {shape[0]}×{shape[1]} as in the first image"
            )
        return pixels


@dataclasses.dataclass(frozen=True, eq=False)
class SourceImages(Images):
    """The images of a data source, in its order."""

    source: Source

    def __post_init__(self):
        if not len(self.source):
            raise UserError(f"no images in the {self.source.split} split of config.data={self.source.name}")
        if (image := self.source[0]["image"]).dtype != np.uint8 or self.shape[2] not in MODES:
            raise UserError(
                f"unsupported images in the {self.source.split} split of config.data={self.source.name}: got"
                f" {image.dtype} with {self.shape[2]} channels; expected uint8 with 1 or 3. Set"
                " config.evaluation.reference to a folder or an npz file of images or statistics"
            )

    @property
    def name(self) -> str:
        """Source and split."""
        return f"{self.source.split} split of {self.source.name}"

    @property
    def shape(self) -> Shape:
        """(height, width, channels)."""
        return self.source.image_shape

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source."""
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def parts(self, first: int, size: int, stop: int) -> Iterator[Part]:
        """Yield images first … stop - 1, `size` at a time, read by several threads."""
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            for start in range(first, stop, size):
                own = own_share(start, min(start + size, stop))
                images = list(threads.map(self._image, own))
                yield np.array(own, int), np.array(images, np.uint8).reshape(len(own), *self.shape)

    def _image(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        return self.source[index]["image"]


def open_images(path: str | os.PathLike) -> NpzImages | FolderImages:
    """Open the images of a folder or an npz file.

    Raises:
        UserError: there is no such folder or file.
    """
    path = to_path(path)
    if path.is_dir():
        return FolderImages(path)
    if path.is_file():
        return NpzImages(path)
    raise UserError(f"no such folder or file: {path}; expected a folder of images or FILE.npz")
