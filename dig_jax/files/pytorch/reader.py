"""Read tensors and containers from PyTorch's .pt files without PyTorch and without running code.

A file is a zip archive of uncompressed members (PyTorch ≥ 1.6): NAME/data.pkl, a pickle with a persistent id
for each storage; NAME/data/KEY, the bytes of a storage; and NAME/byteorder. `pickle_reader` reads the pickle
as data. All sizes are checked against the file before anything is allocated; storages are read on demand.
"""

import contextlib
import dataclasses
import math
import mmap
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dig_jax.errors import CheckpointError, InvalidFile
from dig_jax.files.paths import Path, local_copy
from dig_jax.files.pytorch.pickle_reader import MAX_NAME, Name, Opaque, insert, read_pickle

_DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_BYTE_ORDERS = {b"little": "<", b"big": ">"}
# Bytes. The pickle of DiG-XL/2 with its average and optimizer state has 0.3 MB.
_MAX_PICKLE = 4 * 2**20
_MAX_DIRECTORY = 8 * 2**20
_MAX_DEPTH = _MAX_DIMENSIONS = 8
# A training run's file has some thousands of names. A pickle can refer to one dict many times, so that few
# bytes describe any number of names.
_MAX_ENTRIES = 100_000
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


@dataclasses.dataclass(frozen=True)
class Storage:
    """A member of the archive: `numel` values of one dtype."""

    member: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a part of a storage. Offset and strides count values, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values."""
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TorchFile:
    """An open .pt file; see `open_torch`.

    Attributes:
        content: the pickled object: dicts, lists, numbers, `Tensor`s, and `Opaque` for everything else.
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
        self._order = _BYTE_ORDERS[order]
        self._entries = 0  # of all OrderedDicts that were made from lists
        self.content = read_pickle(
            bytes(self._bytes(f"{self._root}data.pkl", _MAX_PICKLE)),
            {
                "collections.OrderedDict": self._ordered_dict,
                "torch._utils._rebuild_tensor": _tensor,
                "torch._utils._rebuild_tensor_v2": _tensor,
                "torch._utils._rebuild_parameter": _parameter,
            },
            self._storage,
        )

    def names(self) -> list[str]:
        """Return the dotted names of all tensors; entries with invalid names are left out."""
        content = self.content if isinstance(self.content, dict) else {}
        return [name for name, value in _flattened(content) if isinstance(value, Tensor)]

    def tensors(self, tree: str = "") -> dict[str, Tensor]:
        """Return the tensors below a dotted path, such as "ema" or "opt.state", by their names below it.

        The last parts of the path may be a prefix of the names, such as "module" for "module.conv.weight".

        Raises:
            InvalidFile: unknown tree, an entry that is not a tensor, or tensors with more than twice the
                bytes of the file.
        """
        found: dict[str, Tensor] = {}
        node, prefix = self._locate(tree)
        for full_name, value in _flattened(node):
            if not full_name.startswith(prefix):
                continue
            name = full_name[len(prefix) :]
            if isinstance(value, InvalidFile):
                raise value
            if not isinstance(value, Tensor):
                raise InvalidFile(f"invalid {_joined(tree, name)}: got {_kind(value)}; expected a tensor")
            insert(found, name, value)
        if prefix and not found:
            choices = ", ".join(key for key in node if isinstance(key, str))[:200]
            raise InvalidFile(f"unknown tree {tree!r}; expected one of: {choices or 'none'}")
        claimed = sum(tensor.nbytes for tensor in set(found.values()))
        if claimed > 2 * len(self._data):
            raise InvalidFile(
                f"tensors too large: got {claimed:,} bytes; expected at most twice the file's"
                f" {len(self._data):,} bytes"
            )
        return found

    def _locate(self, tree: str) -> tuple[dict, str]:
        """Return the dict at the first parts of a dotted path, and the other parts as a prefix of names."""
        node, parts = self.content, list(filter(None, tree.split(".")))
        while parts and isinstance(node, dict) and parts[0] in node:
            node = node[parts.pop(0)]
        if not isinstance(node, dict):
            raise InvalidFile(f"invalid {tree or 'content'}: got {_kind(node)}; expected a tree of tensors")
        return node, "".join(f"{part}." for part in parts)

    def read(self, tensor: Tensor) -> np.ndarray:
        """Return a copy of a tensor's values.

        Raises:
            InvalidFile: the storage is corrupt.
        """
        storage = tensor.storage
        data = self._bytes(storage.member, storage.numel * storage.dtype.itemsize)
        # NumPy has no byte order for bfloat16, so bytes are swapped as integers.
        size = storage.dtype.itemsize
        values = np.frombuffer(data, f"{self._order}u{size}")[tensor.offset :]
        strides = [stride * size for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
        return view.astype(f"=u{size}", order="C").view(storage.dtype)

    def _bytes(self, member: str, limit: int, default: bytes | None = None) -> memoryview:
        """Return a view of a member's bytes after verifying the checksum."""
        if member not in self._members:
            if default is None:
                raise InvalidFile(f"missing member {member}")
            return memoryview(default)
        info = self._members[member]
        if info.file_size > limit:
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

    def _ordered_dict(self, arguments: tuple) -> dict:
        result: dict = {}
        match arguments:
            case ():
                pass
            case (list(pairs),):
                self._entries += len(pairs)
                _check_entries(self._entries)
                for pair in pairs:
                    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                        raise InvalidFile("corrupt pickle: OrderedDict of something other than pairs")
                    insert(result, *pair)
            case _:
                raise InvalidFile("corrupt pickle: OrderedDict of something other than pairs")
        return result

    def _storage(self, persistent_id: Any) -> Storage | Opaque:
        match persistent_id:
            case ("storage", Name(module="torch", name=kind), str(key), str(), int(numel)) if (
                kind in _DTYPES and len(key) <= MAX_NAME
            ):
                dtype, member = np.dtype(_DTYPES[kind]), f"{self._root}data/{key}"
                if member not in self._members:
                    raise InvalidFile(f"missing storage {member[:100]}")
                size = self._members[member].file_size
                if numel * dtype.itemsize != size:
                    raise InvalidFile(
                        f"{member[:100]} has {size:,} bytes; expected {numel:,} values of {dtype}"
                    )
                return Storage(member, dtype, numel)
        return Opaque("unsupported storage")


@contextlib.contextmanager
def open_torch(path: Path) -> Iterator[TorchFile]:
    """Open a .pt file. Errors that occur while it is open name the file.

    Raises:
        CheckpointError: the file is missing, unreadable or invalid.
    """
    try:
        with local_copy(path) as local, local.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InvalidFile("empty file")
            # Closed by the garbage collector: after an error, views of its bytes may still exist.
            yield TorchFile(local, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except InvalidFile as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


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
    if data[: len(_OLD_FORMAT)] == _OLD_FORMAT:
        raise InvalidFile(
            "unsupported format of PyTorch before 1.6; convert it with torch.save(torch.load(FILE), NEW)"
        )
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


def _parameter(arguments: tuple) -> Tensor | Opaque:
    is_tensor = arguments and isinstance(arguments[0], Tensor)
    return arguments[0] if is_tensor else Opaque("parameter without a tensor")


def _tensor(arguments: tuple) -> Tensor | Opaque:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            pass
        case (Opaque(), *_):
            return Opaque("unsupported tensor")
        case _:
            raise InvalidFile("corrupt pickle: tensor without a storage, offset, shape and strides")
    if max(len(shape), len(strides)) > _MAX_DIMENSIONS:
        raise InvalidFile(
            f"too many dimensions: got {max(len(shape), len(strides))}; expected at most {_MAX_DIMENSIONS}"
        )
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or len(shape) != len(strides):
        raise InvalidFile("corrupt pickle: invalid offset, shape or strides of a tensor")
    if math.prod(shape) == 0:
        return Opaque("tensor without values")
    return _view(storage, offset, shape, strides)


def _view(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Check that a view does not exceed its storage and that its values do not repeat."""
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= storage.numel:
        raise InvalidFile(
            f"tensor of shape {list(shape)} exceeds its storage: got index {last:,} of"
            f" {storage.numel:,} values in {storage.member[:100]}"
        )
    if math.prod(shape) > storage.numel:
        raise InvalidFile(
            f"tensor of shape {list(shape)} repeats values: its storage has only {storage.numel:,}"
        )
    return Tensor(storage, offset, shape, strides)


def _check_entries(count: int) -> None:
    if count > _MAX_ENTRIES:
        raise InvalidFile(f"too many names: expected at most {_MAX_ENTRIES:,}")


def _flattened(tree: dict) -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts with its dotted name; an InvalidFile in place of an invalid entry."""
    pending: list[tuple[str, int, Any]] = [("", 0, tree)]
    entries = 0
    while pending:
        prefix, depth, node = pending.pop()
        if not isinstance(node, dict) or (prefix and not node):
            yield prefix, node
            continue
        if depth == _MAX_DEPTH:
            yield prefix, InvalidFile(f"trees nested too deeply; expected at most {_MAX_DEPTH} levels")
            continue
        entries += len(node)
        _check_entries(entries)
        for key, value in reversed(node.items()):
            text = str(key) if isinstance(key, (str, int)) else ""
            name = _joined(prefix, text[:MAX_NAME])
            if isinstance(key, Opaque) or len(prefix) + len(text) > MAX_NAME or not text.isprintable():
                value = InvalidFile(f"invalid name {name[:40]!r}")
            pending.append((name, depth + 1, value))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _kind(value: Any) -> str:
    return value.kind[:100] if isinstance(value, Opaque) else type(value).__name__
