"""Files of safetensors, read strictly: a bounded header that is true, in which each name stands once."""

import contextlib
import dataclasses
import json
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dig_jax.errors import CheckpointError
from dig_jax.files.atomic import replacing

# Bytes. The published autoencoder's and DiG-XL's are of some 30 kB; ours may name many thousand classes.
MAX_HEADER = 8 * 2**20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file: what is known before it is read.

    dtype: its name in NumPy, or in the file where it is none of the common ones.
    read: gives its values.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """An open file.

    arrays: by their names.
    metadata: the texts in its header.
    """

    arrays: Mapping[str, StoredArray]
    metadata: Mapping[str, str]


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    """Opens a file; every array has its bytes in it, every byte is an array's, and nothing is read yet.

    Raises:
        CheckpointError: it is not there, cannot be read, or is no such file or a damaged one; in one line.
    """
    with _telling(path):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER:
                raise _Lie(f"its header claims {size:,} bytes, more than {MAX_HEADER:,}")
            _check_names(file.read(size))
        opened = safe_open(path, framework="numpy")
    with opened as file:
        arrays = {}
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            part = file.get_slice(name)
            dtype = part.get_dtype()
            read = _reader(path, file, name)
            arrays[name] = StoredArray(tuple(part.get_shape()), _DTYPES.get(dtype, dtype), read)
        yield SafetensorsFile(arrays, file.metadata() or {})


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    with replacing(path) as file:
        try:
            save_file(dict(arrays), file.name, dict(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        # The library puts another file there, which is the owner's alone.
        os.chmod(file.name, os.fstat(file.fileno()).st_mode)


def _reader(path: Path, file: Any, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with _telling(path):
            return file.get_tensor(name)

    return read


class _Lie(Exception):
    """What the library does not mind, and we do."""


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, _Lie) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: {reason}") from error


def _check_names(header: bytes) -> None:
    """What readers take silently: one name for several arrays."""
    # What is no JSON at all is told by the library.
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(header, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    name, count = max(Counter(name for name, _ in pairs).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise _Lie(f"the name {reprlib.repr(name)} stands twice in its header")
    return dict(pairs)
