"""Files of other people's parameters, in any of the formats, as upstream's names and layouts."""

import contextlib
import dataclasses
import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dig_jax.convert.diffusers import WEIGHTS, as_upstream
from dig_jax.convert.pytorch.pickle_reader import Opaque, put
from dig_jax.convert.pytorch.reader import Tensor, TorchFile, open_torch
from dig_jax.errors import CheckpointError, InvalidFile
from dig_jax.files.safetensors import StoredArray, open_safetensors

_DIFFUSERS_FILES = (
    WEIGHTS,
    f"{WEIGHTS}.index.json",  # of several files
    "diffusion_pytorch_model.bin",
)
_TREES = ("ema", "model", "state_dict")
_MAX_JSON = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class UpstreamParams:
    """Somebody's parameters.

    stored: upstream's arrays by their names.
    tree: which of the file's trees they are; "" where it has none.
    hints: what stands beside them: a run's arguments, or diffusers' config.
    """

    stored: dict[str, StoredArray]
    tree: str
    hints: dict[Any, Any]


@contextlib.contextmanager
def open_upstream(path: Path, tree: str | None = None) -> Iterator[UpstreamParams]:
    """Opens a file of PyTorch (.pt, .bin) or safetensors, or a folder as diffusers writes it.

    Args:
        tree: "model", "ema" or another dotted path in a file of PyTorch; by default the average, where there
            is one.

    Raises:
        CheckpointError: the file is damaged, hostile, or of no known kind.
    """
    if path.is_dir():
        there = [path / name for name in _DIFFUSERS_FILES if (path / name).is_file()]
        if not there:
            raise CheckpointError(f"{path}: has neither checkpoints nor {' or '.join(_DIFFUSERS_FILES)}")
        path = there[0]
    try:
        with contextlib.ExitStack() as stack:
            if path.suffix in (".safetensors", ".json"):
                if tree:
                    raise InvalidFile(f"a safetensors file has no trees, and so no --tree={tree}")
                files = [path] if path.suffix == ".safetensors" else _shards(path)
                stored, hints, tree = {}, _diffusers_config(path), ""
                for file in files:
                    for name, array in stack.enter_context(open_safetensors(file)).arrays.items():
                        put(stored, name, array)
            else:
                file = stack.enter_context(open_torch(path))
                stored, hints, tree = _of_torch(file, tree, path)
            yield UpstreamParams(as_upstream(stored), tree, hints)
    except InvalidFile as error:
        raise CheckpointError(f"{path}: {error}") from error


def _of_torch(
    file: TorchFile, tree: str | None, path: Path
) -> tuple[dict[str, StoredArray], dict[Any, Any], str]:
    content = file.content if isinstance(file.content, dict) else {}
    if tree is None:
        tree = next((name for name in _TREES if isinstance(content.get(name), dict)), "")
    stored = {name: _stored(file, tensor) for name, tensor in file.tensors(tree).items()}
    arguments = content.get("args")
    hints = arguments.state if isinstance(arguments, Opaque) else _diffusers_config(path)
    return stored, hints, tree


def _shards(index: Path) -> list[Path]:
    """The files that an index of diffusers names, beside it; their own headers say what is in them."""
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InvalidFile("is no index of diffusers: it has no weight_map")
    files = sorted(set(map(str, names.values())))
    for file in files:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise InvalidFile(f"names {reprlib.repr(file)}, which is no safetensors file beside it")
    return [index.with_name(file) for file in files]


def _diffusers_config(path: Path) -> dict[Any, Any]:
    """config.json beside a file, where it is one of diffusers' DiT."""
    config = _json(path.with_name("config.json"))
    return config if "num_attention_heads" in config else {}


def _json(path: Path) -> dict[Any, Any]:
    """An object in a small file, empty where there is none."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _stored(file: TorchFile, tensor: Tensor) -> StoredArray:
    return StoredArray(tensor.shape, tensor.dtype.name, lambda: file.read(tensor))
