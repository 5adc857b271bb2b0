"""Open checkpoints of other programs in any supported format, under upstream's names and layouts."""

import contextlib
import dataclasses
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dig_jax.convert.diffusers import WEIGHTS, as_upstream
from dig_jax.errors import CheckpointError, InvalidFile
from dig_jax.files.pytorch.pickle_reader import Opaque, insert
from dig_jax.files.pytorch.reader import Tensor, TorchFile, open_torch
from dig_jax.files.safetensors import SafetensorsFile, StoredArray, open_safetensors

_DIFFUSERS_FILES = (
    WEIGHTS,
    f"{WEIGHTS}.index.json",  # sharded
    "diffusion_pytorch_model.bin",
)
_TREES = ("ema", "model", "state_dict")
_MAX_JSON = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class UpstreamParams:
    """Parameters under upstream's names.

    stored: the arrays by name.
    tree: the tree of the file that holds them; "" if the file has no trees.
    hints: arguments of the training run or diffusers' config, if there are any.
    """

    stored: Mapping[str, StoredArray]
    tree: str
    hints: dict[Any, Any]


@contextlib.contextmanager
def open_upstream(path: Path, tree: str | None = None) -> Iterator[UpstreamParams]:
    """Open a PyTorch file (.pt, .bin), a safetensors file or index, or a folder written by diffusers.

    Args:
        tree: "model", "ema" or another dotted path in a PyTorch file. The default is the first of "ema",
            "model" and "state_dict" in the file.

    Raises:
        CheckpointError: the file is missing, invalid or unsupported.
    """
    if path.is_dir():
        there = [path / name for name in _DIFFUSERS_FILES if (path / name).is_file()]
        if not there:
            raise CheckpointError(
                f"{path}: no checkpoints or diffusers weights; expected {' or '.join(_DIFFUSERS_FILES)}"
            )
        path = there[0]
    try:
        with contextlib.ExitStack() as stack:
            if path.suffix in (".safetensors", ".json"):
                if tree:
                    raise InvalidFile(f"--tree={tree} does not apply to a safetensors file")
                files = [path] if path.suffix == ".safetensors" else _shards(path)
                opened = [stack.enter_context(open_safetensors(file)) for file in files]
                params = UpstreamParams(_from_safetensors(opened), "", _diffusers_config(path))
            else:
                params = _from_torch(stack.enter_context(open_torch(path)), tree, path)
            yield dataclasses.replace(params, stored=as_upstream(params.stored))
    except InvalidFile as error:
        raise CheckpointError(f"{path}: {error}") from error


def _from_safetensors(files: Iterable[SafetensorsFile]) -> dict[str, StoredArray]:
    arrays: dict[str, StoredArray] = {}
    for file in files:
        for name, array in file.arrays.items():
            insert(arrays, name, array)
    return arrays


def _from_torch(file: TorchFile, tree: str | None, path: Path) -> UpstreamParams:
    content = file.content if isinstance(file.content, dict) else {}
    if tree is None:
        tree = next((name for name in _TREES if isinstance(content.get(name), dict)), "")
    arrays = {name: _stored_array(file, tensor) for name, tensor in file.tensors(tree).items()}
    arguments = content.get("args")
    hints = arguments.state if isinstance(arguments, Opaque) else _diffusers_config(path)
    return UpstreamParams(arrays, tree, hints)


def _shards(index: Path) -> list[Path]:
    """Return the files of a diffusers index. Only files in the same folder are allowed."""
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InvalidFile("missing weight_map; expected the index of diffusers weights")
    files = sorted(set(map(str, names.values())))
    for file in files:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", file):
            raise InvalidFile(
                f"invalid file in weight_map: got {reprlib.repr(file)}; expected a safetensors file in the"
                " same folder"
            )
    return [index.with_name(file) for file in files]


def _diffusers_config(path: Path) -> dict[Any, Any]:
    """Return config.json in the file's folder if it describes diffusers' DiT, else {}."""
    config = _json(path.with_name("config.json"))
    return config if "num_attention_heads" in config else {}


def _json(path: Path) -> dict[Any, Any]:
    """Return the object in a small JSON file, or {} if there is none."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _stored_array(file: TorchFile, tensor: Tensor) -> StoredArray:
    return StoredArray(tensor.shape, tensor.dtype.name, lambda: file.read(tensor))
