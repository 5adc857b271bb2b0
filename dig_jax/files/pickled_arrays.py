"""Arrays of NumPy or JAX in a pickle of nested dicts, read without running code.

JAX ports of FID's Inception network publish their weights in such a file.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from dig_jax.errors import InvalidFile
from dig_jax.files.paths import Path
from dig_jax.files.pytorch.pickle_reader import Name, Opaque, Stateful, read_pickle
from dig_jax.files.pytorch.reader import flattened
from dig_jax.files.safetensors import StoredArray

_MAX_BYTES = 2**30
_DTYPE = re.compile("[fiu][1248]|b1")


@dataclasses.dataclass(eq=False)
class _Dtype(Stateful):
    code: str
    order: str = "|"

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), "<" | ">" | "|" as order, *_):
                self.order = order
            case _:
                raise InvalidFile("corrupt pickle: invalid state of a dtype")

    def dtype(self) -> np.dtype:
        if not _DTYPE.fullmatch(self.code):
            raise InvalidFile(f"unsupported dtype {self.code[:20]!r} in a pickle; expected numbers")
        return np.dtype(self.order + self.code)


@dataclasses.dataclass(eq=False)
class _Array(Stateful):
    values: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        match state:
            case (int(), tuple(shape), _Dtype() as dtype, fortran, bytes() | bytearray() as data):
                self.values = _values(data, dtype, shape, "F" if fortran is True else "C")
            case _:
                raise InvalidFile("corrupt pickle: invalid state of an array")


def read_arrays(path: Path) -> dict[str, StoredArray]:
    """Return the arrays by their dotted names; other entries of the dicts are skipped.

    Raises:
        InvalidFile: the pickle is corrupt or holds something else.
        OSError: the file is missing or unreadable.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InvalidFile(f"pickle too large: expected at most {_MAX_BYTES:,} bytes")
    content = read_pickle(data, _BUILDERS, lambda _: Opaque("a persistent id"))
    if not isinstance(content, dict):
        raise InvalidFile(f"invalid pickle: got {type(content).__name__}; expected nested dicts of arrays")
    arrays = {}
    for name, leaf in flattened(content):
        if isinstance(leaf, InvalidFile):
            raise leaf
        if isinstance(leaf, _Array) and leaf.values is not None:
            values = leaf.values
            arrays[name] = StoredArray(values.shape, values.dtype.name, lambda values=values: values)
    return arrays


def _values(data: bytes | bytearray, dtype: _Dtype, shape: tuple, order: Any) -> np.ndarray:
    kind = dtype.dtype()
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * kind.itemsize != len(data):
        raise InvalidFile(f"corrupt pickle: array of shape {shape!r:.60} with {len(data):,} bytes")
    values = np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")
    return values.astype(kind.newbyteorder("="), copy=False)


def _dtype(arguments: tuple) -> Any:
    return _Dtype(arguments[0]) if arguments and isinstance(arguments[0], str) else Opaque("dtype")


def _from_buffer(arguments: tuple) -> Any:
    match arguments:
        case (bytes() | bytearray() as data, _Dtype() as dtype, tuple(shape), order):
            return _Array(_values(data, dtype, shape, order))
    return Opaque("array")


def _jax_array(arguments: tuple) -> Any:
    match arguments:
        case (Name(name="_reconstruct"), tuple(), state, *_):
            array = _Array()
            array.set_state(state)
            return array
        case (Name(name="_frombuffer"), tuple(inner), *_):
            return _from_buffer(inner)
    return Opaque("array")


def _encode(arguments: tuple) -> Any:
    # Protocol 2 stores bytes as text.
    match arguments:
        case (str(text), "latin1"):
            return text.encode("latin1")
    return Opaque("bytes")


_BUILDERS = {
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "jax._src.array._reconstruct_array": _jax_array,
    # NumPy 2 renamed the package.
    **{f"numpy.{core}.multiarray._reconstruct": lambda _: _Array() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
