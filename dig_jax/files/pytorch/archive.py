"""The zip archive of a .pt file (PyTorch ≥ 1.6).

Its members are not compressed: NAME/data.pkl, NAME/data/KEY with the bytes of a storage, and NAME/byteorder.
"""

import mmap
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from dig_jax.errors import InvalidFile
from dig_jax.files.pytorch.pickle_reader import MAX_PICKLE, insert

_BYTE_ORDERS = {b"little": "<", b"big": ">"}
_MAX_DIRECTORY = 8 * 2**20  # bytes


class Archive:
    """Pickle, storages and byte order of an open file.

    Attributes:
        pickle: the bytes of the pickle.
        order: "<" or ">", the byte order of the storages.

    Raises:
        InvalidFile: the archive is not one that PyTorch writes.
    """

    def __init__(self, path: pathlib.Path, data: mmap.mmap):
        self._data = data
        self._verified: set[str] = set()  # members with a correct checksum
        self._members = _members(path, data)
        roots = [name[: -len("data.pkl")] for name in self._members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InvalidFile("not a PyTorch file: expected a zip archive with one data.pkl")
        self._root = roots[0]
        order = bytes(self._bytes(f"{self._root}byteorder", 16, default=b"little"))
        if order not in _BYTE_ORDERS:
            raise InvalidFile(f"invalid byte order: got {order!r}; expected little or big")
        self.order = _BYTE_ORDERS[order]
        self.pickle = bytes(self._bytes(f"{self._root}data.pkl", MAX_PICKLE))

    def declare(self, key: str, dtype: np.dtype, numel: int) -> None:
        """Check that a storage exists and has this size.

        Raises:
            InvalidFile: it does not.
        """
        member = self._member(key)
        if member not in self._members:
            raise InvalidFile(f"missing storage {member[:100]}")
        size = self._members[member].file_size
        if numel * dtype.itemsize != size:
            raise InvalidFile(f"{member[:100]} has {size:,} bytes; expected {numel:,} values of {dtype}")

    def read(self, key: str) -> memoryview:
        """Return a view of the bytes of a declared storage after verifying the checksum.

        Raises:
            InvalidFile: the storage is corrupt.
        """
        return self._bytes(self._member(key))

    def _member(self, key: str) -> str:
        return f"{self._root}data/{key}"

    def _bytes(self, member: str, limit: int | None = None, default: bytes | None = None) -> memoryview:
        if member not in self._members:
            if default is None:
                raise InvalidFile(f"missing member {member}")
            return memoryview(default)
        info = self._members[member]
        if limit is not None and info.file_size > limit:
            raise InvalidFile(f"{member} too large: got {info.file_size:,} bytes; expected at most {limit:,}")
        header = self._data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise InvalidFile(f"corrupt archive: no member {member} at its offset")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + info.file_size > len(self._data):
            raise InvalidFile(f"truncated archive: {member} extends beyond the end of the file")
        data = memoryview(self._data)[start : start + info.file_size]
        if member not in self._verified:
            if zlib.crc32(data) != info.CRC:
                raise InvalidFile(f"corrupt member {member[:100]}: checksum mismatch")
            self._verified.add(member)
        return data


def _members(path: pathlib.Path, data: mmap.mmap) -> Mapping[str, zipfile.ZipInfo]:
    """Return the archive's directory; reject members that PyTorch does not write."""
    _check_directory(data)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InvalidFile(f"corrupt zip archive: {str(error)[:100]}") from error
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = f"{info.filename[:100]!r}"
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise InvalidFile(f"compressed member {name}; expected an uncompressed one")
        if info.flag_bits & 1:
            raise InvalidFile(f"encrypted member {name}; expected an unencrypted one")
        insert(members, info.filename, info)
    return members


def _check_directory(data: mmap.mmap) -> None:
    """Bound the size of the archive's directory before it is read."""
    end = data.rfind(b"PK\5\6", max(0, len(data) - 2**16 - 22))
    if end < 0 or end + 22 > len(data):
        raise InvalidFile("not a PyTorch file, or a truncated one: it does not end in a zip directory")
    # Large archives have a second record (zip64). Check every record that a reader might use.
    records = data[max(0, end - 2**16) : end].split(b"PK\6\6")[1:]
    claims = [int.from_bytes(record[36:44], "little") for record in records]
    plain = int.from_bytes(data[end + 12 : end + 16], "little")
    if plain < 2**32 - 1 or not claims:
        claims.append(plain)
    if max(claims) > _MAX_DIRECTORY:
        raise InvalidFile(
            f"directory too large: got {max(claims):,} bytes; expected at most {_MAX_DIRECTORY:,}"
        )
