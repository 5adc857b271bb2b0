"""A source that reads encoded images from any storage (`EncodedImages`) and decodes them on access."""

import dataclasses
import functools
import hashlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from dig_jax.data.images import CROPS, MODES, SQUARE_CROPS, UnreadableImage, decode, native_size
from dig_jax.data.options import OptionError, image_shape
from dig_jax.data.source import Example, check_label, fingerprint
from dig_jax.errors import UserError, alternatives, suggest

log = logging.getLogger(__name__)

# Log this many unreadable images by name, and later ones by number, at powers of ten.
_LOGGED = 10
# Give up after this many unreadable replacements in a row.
_ATTEMPTS = 100
# Bytes that hold the header of most images, and threads that read headers.
_HEADER, _READERS = 2**16, 16
# Of all sources together: a source with a lock of its own could not be pickled.
_LOCK = threading.Lock()


class EncodedImage(NamedTuple):
    """The content of an image file.

    name: where it is stored, for messages.
    data: the file's content.
    label: its class.
    """

    name: str
    data: bytes
    label: int


@runtime_checkable
class EncodedImages(Protocol):
    """Encoded images with random access, from any thread."""

    @property
    def identity(self) -> str:
        """Hexadecimal hash; equal for equal images in equal order."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, limit: int | None = None) -> EncodedImage:
        """Read the image of 0 ≤ index < len.

        Args:
            index: index of the image.
            limit: bytes after which a storage may cut the file; None: the whole file.

        Raises:
            UserError: the storage failed.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSource:
    """Crops of encoded images.

    image_size: height and width, or one number for both.
    channels: 3 for RGB, 1 for gray.
    notes: what was left out, for the start of a run.

    An image that cannot be decoded is logged, counted and replaced. The replacement depends only on the
    index of the image, not on threads, processes or restarts.
    """

    name: str
    split: str
    images: EncodedImages
    class_names: tuple[str, ...]
    image_size: int | tuple[int, int]
    crop: str
    upright: bool
    channels: int = 3
    flip: bool = True
    notes: tuple[str, ...] = ()
    _unreadable: set[int] = dataclasses.field(default_factory=set, init=False, repr=False)

    def __post_init__(self):
        height, width, _ = self.image_shape
        if self.crop not in CROPS:
            hint = suggest(self.crop, CROPS)
            raise OptionError(self.name, "crop", self.crop, f"{alternatives(list(CROPS))}{hint}")
        if self.crop in SQUARE_CROPS and height != width:
            raise OptionError(self.name, "image_size", self.image_size, f"one number with crop={self.crop!r}")
        if self.channels not in MODES:
            raise OptionError(self.name, "channels", self.channels, "3 (RGB) or 1 (gray)")

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return image_shape(self.name, self.image_size, self.channels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the examples depend on and that is known without reading them."""
        height, width, channels = self.image_shape
        options: tuple[object, ...] = (
            height if height == width else (height, width),
            self.crop,
            self.upright,
        )
        if channels != 3:  # absent in the fingerprints of older workdirs
            options += (channels,)
        return fingerprint(self.name, self.split, self.images.identity, self.class_names, options)

    @property
    def num_unreadable(self) -> int:
        """Number of images that could not be decoded so far."""
        return len(self._unreadable)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for a source of {len(self)} images")
        for attempt in range(_ATTEMPTS):
            candidate = _replacement(index, attempt, len(self)) if attempt else index
            if candidate in self._unreadable:
                continue
            image = self.images.read(candidate)
            try:
                return self.decode(image)
            except UnreadableImage as error:
                self._log_unreadable(candidate, image.name, error)
        raise UserError(
            f"the {self.name} source found {_ATTEMPTS} unreadable images in a row; the log names the first"
        )

    def decode(self, image: EncodedImage) -> Example:
        """Return an image as an example, without replacing it if it is unreadable.

        Raises:
            UnreadableImage: the image cannot be decoded; the message gives the reason.
            UserError: the label is not that of a class.
        """
        check_label(image.label, self.num_classes, image.name)
        height, width, channels = self.image_shape
        decoded = decode(image.data, upright=self.upright, channels=channels)
        pixels = CROPS[self.crop](decoded, (height, width))
        return {"image": pixels, "label": np.int32(image.label)}

    def resized(self, size: tuple[int, int]) -> "EncodedSource":
        """Return the same images at another (height, width)."""
        return dataclasses.replace(self, image_size=size)

    def native_sizes(self) -> Int[np.ndarray, "n 2"]:
        """Return (height, width) of all stored images; unreadable ones count as squares."""
        with ThreadPoolExecutor(_READERS) as pool:
            return np.array(list(pool.map(self._native_size, range(len(self)))))

    def _native_size(self, index: int) -> tuple[int, int]:
        for limit in (_HEADER, None):  # large metadata may precede the size
            try:
                return native_size(self.images.read(index, limit).data, upright=self.upright)
            except UnreadableImage:
                pass
        return 1, 1

    def _log_unreadable(self, index: int, name: str, error: UnreadableImage) -> None:
        with _LOCK:
            if index in self._unreadable:
                return
            self._unreadable.add(index)
            count = len(self._unreadable)
        if count <= _LOGGED:
            last = "; further ones are only counted" if count == _LOGGED else ""
            log.warning("replaced unreadable image %s: %s%s", name, error, last)
        elif str(count).strip("0") == "1":
            log.warning("replaced %d unreadable images", count)


def _replacement(index: int, attempt: int, length: int) -> int:
    digest = hashlib.sha256(f"{index} {attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % length
