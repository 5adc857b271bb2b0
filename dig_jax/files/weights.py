"""Arrays in files of other programs: safetensors, PyTorch's format, a pickle, or several files with an index.

The content of a file decides how it is read. Folders have the layout of diffusers.
"""

import contextlib
import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dig_jax.errors import CheckpointError, InvalidFile
from dig_jax.files.content import weights_format
from dig_jax.files.json_file import read_json
from dig_jax.files.paths import Path, children
from dig_jax.files.pickled_arrays import read_arrays
from dig_jax.files.pytorch.pickle_reader import insert
from dig_jax.files.pytorch.reader import TorchFile, open_torch
from dig_jax.files.safetensors import StoredArray, open_safetensors

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# A variant, such as fp16, stands before the suffix or in the name of the index.
_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))??\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?")
_SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)")
_MAX_JSON = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of an open file.

    names: the names of all arrays.
    below: function of a dotted prefix such as "module" that returns the arrays below it by the rest of their
        names; "" returns all arrays.
    content: the pickled object of a PyTorch file, else None.
    """

    names: Sequence[str]
    below: Callable[[str], dict[str, StoredArray]]
    content: Any = None


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Open a safetensors file, a PyTorch file, a pickle of arrays, or diffusers' index of several such files.

    Raises:
        CheckpointError: the file is missing, unreadable, or of another kind.
    """
    with contextlib.ExitStack() as stack:
        if path.suffix != ".json":
            yield _open_file(path, stack)
            return
        with naming_file(path):
            files = _shards(path)
        opened = [_open_file(file, stack) for file in files]

        def below(prefix: str) -> dict[str, StoredArray]:
            arrays: dict[str, StoredArray] = {}
            for file in opened:
                for name, array in file.below(prefix).items():
                    insert(arrays, name, array)
            return arrays

        yield Weights([name for file in opened for name in file.names], below)


def find_weights(folder: Path, component: str) -> Path:
    """Return diffusers' file of weights, or the index of several, in the folder of a model or a pipeline.

    Args:
        folder: a model's folder, or a pipeline's, which holds a folder per component.
        component: the component of a pipeline: "transformer" or "vae".

    Raises:
        CheckpointError: no weights, or several variants, of which the user must name one.
    """
    found = _variants(folder)
    if not found and (folder / component).is_dir():
        folder = folder / component
        found = _variants(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: no weights; expected {WEIGHTS_FILE}, an index of several files, or a .bin file"
        )
    if None not in found and len(found) > 1:
        names = " or ".join(path.name for path in found.values())
        raise CheckpointError(f"{folder}: several variants of the weights; expected one file: {names}")
    return found[None] if None in found else next(iter(found.values()))


def has_weights(folder: Path) -> bool:
    """Return whether a folder has diffusers' layout, of a model or of a pipeline."""
    return bool(_variants(folder)) or (folder / "model_index.json").exists()


def read_json_object(path: Path) -> dict[Any, Any]:
    """Return the object in a small JSON file, or {} if there is none."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn an InvalidFile or OSError of the block into a CheckpointError that names the file."""
    try:
        yield
    except InvalidFile as error:
        raise CheckpointError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file: {error.strerror or error}") from error


def _variants(folder: Path) -> dict[str | None, Path]:
    """Return the preferred file of each variant; None is the variant without a name."""
    with naming_file(folder):
        matches = [(_WEIGHTS.fullmatch(path.name), path) for path in children(folder)]
    ranked = sorted(
        (
            (match[2] == "bin", match[3] is not None, match[1] or match[4], path)
            for match, path in matches
            if match
        ),
        key=lambda item: item[:2],
    )
    found: dict[str | None, Path] = {}
    for *_, variant, path in ranked:
        found.setdefault(variant, path)
    return found


def _shards(index: Path) -> list[Path]:
    """Return the files of an index. Only files in the same folder are allowed."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InvalidFile("missing weight_map; expected the index of diffusers weights")
    files = sorted(set(map(str, names.values())))
    for file in files:
        if not _SHARD.fullmatch(file):
            raise InvalidFile(
                f"invalid file in weight_map: got {reprlib.repr(file)}; expected a safetensors or .bin file"
                " in the same folder"
            )
    return [index.with_name(file) for file in files]


def _open_file(path: Path, stack: contextlib.ExitStack) -> Weights:
    with naming_file(path):
        kind = weights_format(path)
    if kind == "pytorch":
        return _torch_weights(stack.enter_context(open_torch(path)))
    if kind == "pickle":
        with naming_file(path):
            arrays = read_arrays(path)
    else:
        arrays = stack.enter_context(open_safetensors(path)).arrays
    return Weights(list(arrays), lambda prefix: _below(arrays, prefix))


def _below(arrays: Mapping[str, StoredArray], prefix: str) -> dict[str, StoredArray]:
    start = f"{prefix}." if prefix else ""
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _torch_weights(file: TorchFile) -> Weights:
    def stored(prefix: str) -> dict[str, StoredArray]:
        return {
            name: StoredArray(tensor.shape, tensor.dtype.name, lambda tensor=tensor: file.read(tensor))
            for name, tensor in file.tensors(prefix).items()
        }

    return Weights(file.names(), stored, file.content)
