"""Write PyTorch's .pt files without PyTorch: an OrderedDict of float32 tensors, as `torch.save` writes it."""

import itertools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_PROTOCOL, _MARK, _TUPLE, _BY_ID, _FALSE, _CALL, _SET_ITEMS, _STOP = (
    b"\x80\x02",
    b"(",
    b"t",
    b"Q",
    b"\x89",
    b"R",
    b"u",
    b".",
)


def write_torch(file: Path | BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a state dict for `torch.load(file, weights_only=True)`. Equal arrays give equal bytes.

    Args:
        arrays: float32. An array under several names is stored once.

    Raises:
        OSError: writing failed.
    """
    members: dict[int, tuple[str, np.ndarray]] = {}
    for array in arrays.values():
        members.setdefault(id(array), (str(len(members)), array))
    keys = {name: members[id(array)][0] for name, array in arrays.items()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, data: bytes | memoryview) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")
            with archive.open(info, "w", force_zip64=len(data) >= 2**31) as member:
                member.write(data)

        write("data.pkl", b"".join(_pickled(arrays, keys)))
        write("byteorder", b"little")
        for key, array in members.values():
            values = np.ascontiguousarray(array, "<f4").reshape(-1)
            write(f"data/{key}", values.view(np.uint8).data)
        write("version", b"3\n")


def _pickled(arrays: Mapping[str, np.ndarray], keys: Mapping[str, str]) -> Iterator[bytes]:
    """Yield a protocol 2 pickle that builds each tensor from a storage, an offset, a shape and strides."""
    yield _PROTOCOL + _ORDERED_DICT + _MARK
    for name, array in arrays.items():
        yield _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + _MARK
        yield _MARK + _text("storage") + b"ctorch\nFloatStorage\n" + _text(keys[name]) + _text("cpu")
        yield _number(array.size) + _TUPLE + _BY_ID + _number(0)
        sizes = array.shape[:0:-1]
        strides = list(itertools.accumulate(sizes, lambda a, b: a * b, initial=1))[::-1] if array.ndim else []
        yield _numbers(array.shape) + _numbers(strides) + _FALSE + _ORDERED_DICT + _TUPLE + _CALL
    yield _SET_ITEMS + _STOP


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(number: int) -> bytes:
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


def _numbers(numbers: tuple[int, ...] | list[int]) -> bytes:
    return _MARK + b"".join(map(_number, numbers)) + _TUPLE
