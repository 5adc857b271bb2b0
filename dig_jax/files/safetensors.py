"""Safetensors files. The reader is strict: it validates the complete header before it reads an array."""

import contextlib
import dataclasses
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dig_jax.errors import CheckpointError, InvalidFile, one_line
from dig_jax.files.atomic import replacing
from dig_jax.files.content import MAX_HEADER, weights_format
from dig_jax.files.paths import Path, local_copy

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file that has not been read yet.

    dtype: NumPy's name, or the name in the file for dtypes that NumPy lacks.
    read: returns the values.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """An open safetensors file: its arrays by name and the metadata of its header."""

    arrays: Mapping[str, StoredArray]
    metadata: Mapping[str, str]


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    """Open a file and validate its header.

    Arrays must fill the file exactly, without gaps or overlaps, and have unique names.

    Raises:
        CheckpointError: the file is missing, unreadable or invalid.
    """
    with contextlib.ExitStack() as stack:
        with _naming_file(path):
            local = stack.enter_context(local_copy(path))
            if weights_format(local) == "pytorch":
                raise InvalidFile("a PyTorch file; convert it with `python -m dig_jax.convert`")
            with local.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > MAX_HEADER:
                    raise InvalidFile(
                        f"header too large: got {size:,} bytes; expected at most {MAX_HEADER:,}"
                    )
                _check_names(file.read(size))
            file = stack.enter_context(safe_open(local, framework="numpy"))
        arrays = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            entry = file.get_slice(name)
            dtype = str(entry.get_dtype())
            read = _reader(path, file, name)
            arrays[name] = StoredArray(tuple(entry.get_shape()), _DTYPES.get(dtype, dtype), read)
        yield SafetensorsFile(arrays, file.metadata() or {})


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file atomically.

    Raises:
        OSError: writing failed.
    """
    with replacing(path) as file:
        try:
            save_file(dict(arrays), file.name, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # save_file replaces the file by one that only the owner can read.
        os.chmod(file.name, os.fstat(file.fileno()).st_mode)


def _reader(path: Path, file: Any, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with _naming_file(path):
            return file.get_tensor(name)

    return read


@contextlib.contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file: {error.strerror or error}") from error
    except (SafetensorError, InvalidFile) as error:
        raise CheckpointError(f"{path}: invalid safetensors file: {one_line(error)[:200]}") from error


def _check_names(header: bytes) -> None:
    """Reject duplicate names, which the library accepts. The library reports invalid JSON."""
    try:
        json.loads(header, object_pairs_hook=_unique)
    except InvalidFile:
        raise
    except (ValueError, RecursionError):
        pass


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    name, count = max(Counter(name for name, _ in pairs).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise InvalidFile(f"duplicate name {reprlib.repr(name)} in the header")
    return dict(pairs)
