"""A .pt file of PyTorch before 1.6 (July 2020), the age of FID's published weights.

The file is a sequence of pickles: a magic number, the version of the format, sizes of the writer's types, the
content, and the keys of the storages. The storages follow in this order, each after its number of values.
There are no checksums.
"""

import functools
import io
import mmap
import pickletools

import numpy as np

from dig_jax.errors import InvalidFile
from dig_jax.files.content import LEGACY_MAGIC
from dig_jax.files.pytorch.pickle_reader import MAX_PICKLE, Opaque, read_pickle

_VERSION = 1001


class LegacyFile:
    """Pickle, storages and byte order of an open file; the interface of `Archive`.

    Raises:
        InvalidFile: the file is corrupt, or from a big-endian machine.
    """

    order = "<"

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._position = len(LEGACY_MAGIC)
        self._storages: dict[str, tuple[np.dtype, int]] = {}
        version, system = self._next_object(), self._next_object()
        if version != _VERSION:
            raise InvalidFile(f"unsupported PyTorch file: got version {version!r:.20}; expected {_VERSION}")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise InvalidFile("unsupported PyTorch file: not written on a little-endian machine")
        self.pickle = self._next_pickle()

    def declare(self, key: str, dtype: np.dtype, numel: int) -> None:
        """Record the size of a storage; the file states it only in the pickle.

        Raises:
            InvalidFile: the pickle gives a storage two sizes, or a negative one.
        """
        if numel < 0:
            raise InvalidFile(f"corrupt pickle: storage {key[:100]} of {numel} values")
        if self._storages.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise InvalidFile(f"corrupt pickle: two sizes of storage {key[:100]}")

    def read(self, key: str) -> memoryview:
        """Return a view of the bytes of a declared storage.

        Raises:
            InvalidFile: the file is truncated, or its storages have other sizes.
        """
        dtype, numel = self._storages[key]
        if key not in self._offsets:
            raise InvalidFile(f"missing storage {key[:100]}")
        start = self._offsets[key]
        return memoryview(self._data)[start : start + numel * dtype.itemsize]

    @functools.cached_property
    def _offsets(self) -> dict[str, int]:
        """The position of the bytes of each storage."""
        keys, offsets = self._next_object(), {}
        if not isinstance(keys, list) or set(map(type, keys)) - {str}:
            raise InvalidFile("corrupt file: expected a list of storages after the content")
        for key in keys:
            if key not in self._storages:
                raise InvalidFile(f"storage {key[:100]} belongs to no tensor")
            dtype, numel = self._storages[key]
            start = self._position + 8
            if start + numel * dtype.itemsize > len(self._data):
                raise InvalidFile(f"truncated file: storage {key[:100]} extends beyond the end of the file")
            stored = int.from_bytes(self._data[self._position : start], "little")
            if stored != numel:
                raise InvalidFile(f"storage {key[:100]} has {stored:,} values; expected {numel:,}")
            offsets[key] = start
            self._position = start + numel * dtype.itemsize
        return offsets

    def _next_object(self) -> object:
        return read_pickle(self._next_pickle(), {}, lambda _: Opaque("storage"))

    def _next_pickle(self) -> bytes:
        """Return the next pickle of the file."""
        data = self._data[self._position : self._position + MAX_PICKLE]
        size = 0
        try:
            for _, _, position in pickletools.genops(io.BytesIO(data)):
                size = (position or 0) + 1  # the last opcode, STOP, is one byte long
        except ValueError as error:
            raise InvalidFile(
                f"truncated or corrupt file: no complete pickle of at most {MAX_PICKLE:,} bytes"
            ) from error
        self._position += size
        return data[:size]
