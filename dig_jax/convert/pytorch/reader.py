"""PyTorch's .pt files, read without PyTorch: tensors and containers are all that is known of them.

A file is a zip archive of uncompressed members (PyTorch ≥ 1.6): NAME/data.pkl, a pickle in which each storage
is a persistent id, NAME/data/KEY, a storage's bytes, and NAME/byteorder. The pickle is read as data
(`pickled.py`). All sizes are compared with the file's own before anything is allocated, and storages are read
when a tensor of them is asked for.
"""

import contextlib
import dataclasses
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dig_jax.convert.pytorch.pickle_reader import Name, Opaque, put, read_pickle
from dig_jax.errors import CheckpointError, InvalidFile

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
# Bytes; that of DiG-XL/2 with its average and optimiser is a third of a megabyte.
_MAX_PICKLE = 4 * 2**20
_MAX_DIRECTORY = 8 * 2**20
_MAX_DEPTH = _MAX_DIMENSIONS = 8
_MAX_NAME = 300
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


@dataclasses.dataclass(frozen=True)
class Storage:
    """A member of the archive: `numel` values of one dtype."""

    member: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage that lies within it; offset and strides are in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of its values."""
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TorchFile:
    """An open file; see `open_torch`.

    Attributes:
        content: all but the storages' bytes: dicts, lists, numbers, `Tensor`s, and `Opaque` for the rest.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self._data = data
        self._sound: set[str] = set()  # members whose checksum is right
        self._members = _members(path, data)
        roots = [name[: -len("data.pkl")] for name in self._members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InvalidFile("is a zip archive, but none that PyTorch wrote: it has no data.pkl, or several")
        self._root = roots[0]
        order = bytes(self._bytes(f"{self._root}byteorder", 16, default=b"little"))
        if order not in _BYTE_ORDERS:
            raise InvalidFile(f"its byte order is {order!r}, and not little or big")
        self._order = _BYTE_ORDERS[order]
        self.content = read_pickle(
            bytes(self._bytes(f"{self._root}data.pkl", _MAX_PICKLE)),
            {
                "collections.OrderedDict": _ordered_dict,
                "torch._utils._rebuild_tensor": _tensor,
                "torch._utils._rebuild_tensor_v2": _tensor,
                "torch._utils._rebuild_parameter": _parameter,
            },
            self._storage,
        )

    def tensors(self, tree: str = "") -> dict[str, Tensor]:
        """The tensors below a dotted path, such as "ema" or "opt.state", by the rest of their names.

        Raises:
            InvalidFile: there is no such tree, something in it is no tensor, or its tensors claim more than
                twice the bytes of the file.
        """
        found: dict[str, Tensor] = {}
        for name, value in _flattened(self._subtree(tree)):
            if not isinstance(value, Tensor):
                raise InvalidFile(f"{_joined(tree, name)} is no tensor ({_kind(value)})")
            put(found, name, value)
        claimed = sum(tensor.nbytes for tensor in set(found.values()))
        if claimed > 2 * len(self._data):
            raise InvalidFile(f"its tensors claim {claimed:,} bytes; the file has {len(self._data):,}")
        return found

    def _subtree(self, tree: str) -> dict:
        node = self.content
        for part in filter(None, tree.split(".")):
            if not isinstance(node, dict) or part not in node:
                there = (
                    ", ".join(key for key in node if isinstance(key, str)) if isinstance(node, dict) else ""
                )
                raise InvalidFile(f"has no tree {tree!r}; there are: {there[:200] or 'none'}")
            node = node[part]
        if not isinstance(node, dict):
            raise InvalidFile(f"{tree or 'all of it'} is no tree of tensors ({_kind(node)})")
        return node

    def read(self, tensor: Tensor) -> np.ndarray:
        """A copy of a tensor's values.

        Raises:
            InvalidFile: its storage's bytes are not those that were written.
        """
        storage = tensor.storage
        data = self._bytes(storage.member, storage.numel * storage.dtype.itemsize)
        # bfloat16 has no byte orders in NumPy: bytes are turned as integers.
        size = storage.dtype.itemsize
        values = np.frombuffer(data, f"{self._order}u{size}")[tensor.offset :]
        strides = [stride * size for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
        return view.astype(f"=u{size}", order="C").view(storage.dtype)

    def _bytes(self, member: str, limit: int, default: bytes | None = None) -> memoryview:
        """A member's bytes, uncopied and sound."""
        if member not in self._members:
            if default is None:
                raise InvalidFile(f"has no member {member}")
            return memoryview(default)
        info = self._members[member]
        if info.file_size > limit:
            raise InvalidFile(f"its {member} claims {info.file_size:,} bytes, more than {limit:,}")
        header = self._data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise InvalidFile(f"is damaged: {member} is not where its directory says")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if start + info.file_size > len(self._data):
            raise InvalidFile(f"is truncated: {member} ends after the file")
        data = memoryview(self._data)[start : start + info.file_size]
        if member not in self._sound:
            if zlib.crc32(data) != info.CRC:
                raise InvalidFile(f"{member[:100]} is damaged: its checksum is another")
            self._sound.add(member)
        return data

    def _storage(self, persistent_id: Any) -> Storage | Opaque:
        match persistent_id:
            case ("storage", Name(module="torch", name=kind), str(key), str(), int(numel)) if kind in _DTYPES:
                dtype, member = np.dtype(_DTYPES[kind]), f"{self._root}data/{key}"
                if member not in self._members:
                    raise InvalidFile(f"is truncated or damaged: the storage {member[:100]} is missing")
                size = self._members[member].file_size
                if numel * dtype.itemsize != size:
                    raise InvalidFile(
                        f"{member[:100]} has {size:,} bytes, and not {numel:,} values of {dtype}"
                    )
                return Storage(member, dtype, numel)
        return Opaque("a storage of another kind")


@contextlib.contextmanager
def open_torch(path: Path) -> Iterator[TorchFile]:
    """Opens a .pt file; whatever is wrong with it, also later, is told in one line.

    Raises:
        CheckpointError: it is not there, no such file, damaged, or holds what is not to be read.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InvalidFile("is empty")
            # Not closed by hand: views of its bytes may be alive where an error leaves.
            yield TorchFile(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except InvalidFile as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _members(path: Path, data: mmap.mmap) -> Mapping[str, zipfile.ZipInfo]:
    """The directory of the archive, bounded and without what PyTorch does not write."""
    if data[: len(_OLD_FORMAT)] == _OLD_FORMAT:
        raise InvalidFile(
            "is of PyTorch's format before 1.6, which is not read here; there,"
            " torch.save(torch.load(FILE), NEW) writes the present one"
        )
    end = data.rfind(b"PK\5\6", max(0, len(data) - 2**16 - 22))
    if end < 0 or end + 22 > len(data):
        raise InvalidFile(
            "is no .pt file of PyTorch, or a truncated one: a zip archive has its directory at the end"
        )
    # Of large archives a second record says it (zip64); any that a reader might take is looked at.
    records = data[max(0, end - 2**16) : end].split(b"PK\6\6")[1:]
    claims = [int.from_bytes(record[36:44], "little") for record in records]
    plain = int.from_bytes(data[end + 12 : end + 16], "little")
    if plain < 2**32 - 1 or not claims:
        claims.append(plain)
    if max(claims) > _MAX_DIRECTORY:
        raise InvalidFile(f"its directory claims {max(claims):,} bytes, more than {_MAX_DIRECTORY:,}")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InvalidFile(f"is a damaged zip archive: {str(error)[:100]}") from error
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise InvalidFile(f"{info.filename[:100]!r} is compressed in it, which PyTorch never does")
        if info.flag_bits & 1:
            raise InvalidFile(f"{info.filename[:100]!r} is encrypted in it")
        put(members, info.filename, info)
    return members


def _ordered_dict(arguments: tuple) -> dict:
    result: dict = {}
    match arguments:
        case ():
            pass
        case (list(pairs),) if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            for key, value in pairs:
                put(result, key, value)
        case _:
            raise InvalidFile("is damaged: an OrderedDict is made of something else than pairs")
    return result


def _parameter(arguments: tuple) -> Tensor | Opaque:
    return (
        arguments[0] if arguments and isinstance(arguments[0], Tensor) else Opaque("a parameter of no tensor")
    )


def _tensor(arguments: tuple) -> Tensor | Opaque:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            pass
        case (Opaque(), *_):
            return Opaque("a tensor of another kind")
        case _:
            raise InvalidFile("is damaged: a tensor is made of something else than a storage and sizes")
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or len(shape) != len(strides):
        raise InvalidFile("is damaged: a tensor's offset, shape or strides cannot be")
    if len(shape) > _MAX_DIMENSIONS:
        raise InvalidFile(f"a tensor in it has {len(shape)} dimensions")
    numel = math.prod(shape)
    if numel == 0:
        return Opaque("a tensor without values")
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= storage.numel:
        raise InvalidFile(
            f"a tensor of shape {list(shape)} reaches to value {last:,} of {storage.member[:100]}, which has"
            f" {storage.numel:,}"
        )
    if numel > storage.numel:
        raise InvalidFile(
            f"a tensor of shape {list(shape)} repeats the {storage.numel:,} values of its storage"
        )
    return Tensor(storage, offset, shape, strides)


def _flattened(tree: dict) -> Iterator[tuple[str, Any]]:
    """All that is no dict, by its dotted name."""
    pending: list[tuple[str, int, Any]] = [("", 0, tree)]
    while pending:
        prefix, depth, node = pending.pop()
        if not isinstance(node, dict) or (prefix and not node):
            yield prefix, node
            continue
        if depth == _MAX_DEPTH:
            raise InvalidFile(f"its trees are nested more than {_MAX_DEPTH} deep")
        for key, value in reversed(node.items()):
            name = _joined(prefix, str(key) if isinstance(key, (str, int)) else "")
            if isinstance(key, Opaque) or len(name) > _MAX_NAME or not name.isprintable():
                raise InvalidFile(f"a name in it is no name: {name[:40]!r}")
            pending.append((name, depth + 1, value))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _kind(value: Any) -> str:
    return value.kind[:100] if isinstance(value, Opaque) else type(value).__name__
