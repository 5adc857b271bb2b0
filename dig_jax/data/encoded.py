"""A source of images that are decoded when they are read, whatever they are stored in."""

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

# How many unreadable images are named in the log; after that only their number is told, at powers of ten.
_NAMED = 10
# Replacements in a row that may be unreadable too.
_ATTEMPTS = 100


class Record(NamedTuple):
    """An encoded image: where it comes from, for messages; the content of its file; its class."""

    name: str
    data: bytes
    label: int


@runtime_checkable
class Records(Protocol):
    """Encoded images with random access, from any thread."""

    @property
    def identity(self) -> str:
        """Hexadecimal; equal for equal records in equal order."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Record:
        """The record of 0 ≤ index < len.

        Raises:
            UserError: the storage fails.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSource:
    """Square crops of encoded images.

    What cannot be decoded is named in the log, counted, and replaced: by an image that depends on its index
    alone, so that threads, processes and restarts change nothing. It keeps its place in the length.
    """

    name: str
    split: str
    records: Records
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
                f"image_size of the {self.name} source must be at least 1, got {self.image_size}"
            )
        if self.crop not in CROPS:
            raise ValueError(f"crop={self.crop!r} is none of {', '.join(CROPS)}{suggest(self.crop, CROPS)}")

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
        """Hash of everything that an example of this source depends on, as far as it is known unread."""
        how = (self.image_size, self.crop, self.upright)
        return fingerprint(self.name, self.split, self.records.identity, self.class_names, how)

    @property
    def num_unreadable(self) -> int:
        """How many images could not be decoded so far."""
        return len(self._unreadable)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a source of {len(self)} images")
        for attempt in range(_ATTEMPTS):
            candidate = _replacement(index, attempt, len(self)) if attempt else index
            if candidate in self._unreadable:
                continue
            record = self.records.read(candidate)
            try:
                return self.decoded(record)
            except UnreadableImage as error:
                self._note(candidate, record.name, error)
        raise UserError(f"no image of the {self.name} source can be read: the log names some")

    def decoded(self, record: Record) -> Example:
        """The example that a record is, for those who want no other image in the place of an unreadable one.

        Raises:
            UnreadableImage: says why.
        """
        image = CROPS[self.crop](decode(record.data, upright=self.upright), self.image_size)
        return {"image": image, "label": np.int32(record.label)}

    def _note(self, index: int, name: str, error: UnreadableImage) -> None:
        with self._lock:
            if index in self._unreadable:
                return
            self._unreadable.add(index)
            count = len(self._unreadable)
        if count <= _NAMED:
            last = "; further ones are only counted" if count == _NAMED else ""
            log.warning("%s is replaced by another image: %s%s", name, error, last)
        elif str(count).strip("0") == "1":
            log.warning("%d images could not be read and are replaced by others", count)


def _replacement(index: int, attempt: int, length: int) -> int:
    digest = hashlib.sha256(f"{index} {attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % length
