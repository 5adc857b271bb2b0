"""A source that reads encoded images from any storage (`EncodedImages`) and decodes them on access."""

import dataclasses
import functools
import hashlib
import logging
import threading
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dig_jax.data.images import CROPS, UnreadableImage, decode
from dig_jax.data.source import Example, fingerprint
from dig_jax.errors import UserError, suggest

log = logging.getLogger(__name__)

# Log this many unreadable images by name, and later ones by number, at powers of ten.
_LOGGED = 10
# Give up after this many unreadable replacements in a row.
_ATTEMPTS = 100


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

    def read(self, index: int) -> EncodedImage:
        """Read the image of 0 ≤ index < len.

        Raises:
            UserError: the storage failed.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSource:
    """Square crops of encoded images.

    An image that cannot be decoded is logged, counted and replaced. The replacement depends only on the
    index of the image, not on threads, processes or restarts.
    """

    name: str
    split: str
    images: EncodedImages
    class_names: tuple[str, ...]
    image_size: int
    crop: str
    upright: bool
    flip: bool = True
    _unreadable: set[int] = dataclasses.field(default_factory=set, init=False, repr=False)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(
                f"invalid image_size={self.image_size} of the {self.name} source; expected at least 1"
            )
        if self.crop not in CROPS:
            hint = suggest(self.crop, CROPS)
            raise ValueError(
                f"invalid crop={self.crop!r} of the {self.name} source; expected {' or '.join(CROPS)}{hint}"
            )

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.image_size, self.image_size, 3

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the examples depend on and that is known without reading them."""
        options = (self.image_size, self.crop, self.upright)
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
        """
        pixels = CROPS[self.crop](decode(image.data, upright=self.upright), self.image_size)
        return {"image": pixels, "label": np.int32(image.label)}

    def _log_unreadable(self, index: int, name: str, error: UnreadableImage) -> None:
        with self._lock:
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
