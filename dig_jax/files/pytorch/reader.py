"""Read tensors and containers from PyTorch's .pt files without PyTorch and without running code.

A file holds a pickle, with a persistent id for each storage, and the bytes of the storages. `archive` finds
them in a zip archive (PyTorch ≥ 1.6), `legacy` in an older file. `pickle_reader` reads the pickle as data.
All sizes are checked against the file before anything is allocated; storages are read on demand.
"""

import contextlib
import dataclasses
import math
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from dig_jax.errors import CheckpointError, InvalidFile
from dig_jax.files.content import LEGACY_MAGIC
from dig_jax.files.paths import Path, local_copy
from dig_jax.files.pytorch.archive import Archive
from dig_jax.files.pytorch.legacy import LegacyFile
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
_MAX_DEPTH = _MAX_DIMENSIONS = 8
# A training run's file has some thousands of names. A pickle can refer to one dict many times, so that few
# bytes describe any number of names.
_MAX_ENTRIES = 100_000


@dataclasses.dataclass(frozen=True)
class Storage:
    """`numel` values of one dtype, which the file stores under a key."""

    key: str
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
        legacy = data[: len(LEGACY_MAGIC)] == LEGACY_MAGIC
        self._container = LegacyFile(data) if legacy else Archive(path, data)
        self._entries = 0  # of all OrderedDicts that were made from lists
        self.content = read_pickle(
            self._container.pickle,
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
        return [name for name, value in flattened(content) if isinstance(value, Tensor)]

    def tensors(self, tree: str = "") -> dict[str, Tensor]:
        """Return the tensors below a dotted path, such as "ema" or "opt.state", by their names below it.

        The last parts of the path may be a prefix of the names, such as "module" for "module.conv.weight".

        Raises:
            InvalidFile: unknown tree, an entry that is not a tensor, or tensors with more than twice the
                bytes of the file.
        """
        found: dict[str, Tensor] = {}
        node, prefix = self._locate(tree)
        for full_name, value in flattened(node):
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
        data = self._container.read(storage.key)
        # NumPy has no byte order for bfloat16, so bytes are swapped as integers.
        size = storage.dtype.itemsize
        values = np.frombuffer(data, f"{self._container.order}u{size}")[tensor.offset :]
        strides = [stride * size for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
        return view.astype(f"=u{size}", order="C").view(storage.dtype)

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
            case ("storage", Name(module="torch", name=kind), str(key), str(), int(numel), *view) if (
                kind in _DTYPES and len(key) <= MAX_NAME and view in ([], [None])
            ):
                dtype = np.dtype(_DTYPES[kind])
                self._container.declare(key, dtype, numel)
                return Storage(key, dtype, numel)
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
            f" {storage.numel:,} values in storage {storage.key[:100]}"
        )
    if math.prod(shape) > storage.numel:
        raise InvalidFile(
            f"tensor of shape {list(shape)} repeats values: its storage has only {storage.numel:,}"
        )
    return Tensor(storage, offset, shape, strides)


def _check_entries(count: int) -> None:
    if count > _MAX_ENTRIES:
        raise InvalidFile(f"too many names: expected at most {_MAX_ENTRIES:,}")


def flattened(tree: dict) -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested dicts with its dotted name; an InvalidFile in place of an invalid entry.

    Raises:
        InvalidFile: too many entries.
    """
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
