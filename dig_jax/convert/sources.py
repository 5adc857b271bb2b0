"""Files of other people's parameters, in any of the formats, as upstream's names and layouts."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dig_jax.convert.names import Stored
from dig_jax.convert.pickled import Opaque, Refused
from dig_jax.convert.torch_file import Tensor, TorchFile, open_torch
from dig_jax.errors import CheckpointError

# diffusers' DiTTransformer2DModel → upstream's DiT; a name stands for its weight and its bias.
_DIFFUSERS_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_DIFFUSERS_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
# Each block has its own copy of these, and diffusers trains them apart; upstream has one.
_DIFFUSERS_SHARED = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_TREES = ("ema", "model", "state_dict")
_MAX_HEADER = 8 * 2**20  # bytes
_MAX_CONFIG = 2**20


@dataclasses.dataclass(frozen=True)
class Source:
    """Somebody's parameters.

    stored: upstream's arrays by their names.
    tree: which of the file's trees they are; "" where it has none.
    hints: what stands beside them: a run's arguments, or diffusers' config.
    """

    stored: dict[str, Stored]
    tree: str
    hints: dict[Any, Any]


@contextlib.contextmanager
def open_source(path: Path, tree: str | None = None) -> Iterator[Source]:
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
    if path.suffix == ".safetensors":
        if tree:
            raise CheckpointError(f"{path}: a safetensors file has no trees, and so no --tree={tree}")
        with _open_safetensors(path) as stored:
            yield Source(_as_upstream(stored), "", _diffusers_config(path))
        return
    with open_torch(path) as file:
        content = file.content if isinstance(file.content, dict) else {}
        if tree is None:
            tree = next((name for name in _TREES if isinstance(content.get(name), dict)), "")
        stored = {name: _stored(file, tensor) for name, tensor in file.tensors(tree).items()}
        arguments = content.get("args")
        hints = arguments.state if isinstance(arguments, Opaque) else _diffusers_config(path)
        yield Source(_as_upstream(stored), tree, hints)


def _diffusers_config(path: Path) -> dict[Any, Any]:
    """config.json beside a file, where it is one of diffusers' DiT."""
    try:
        with path.with_name("config.json").open("rb") as file:
            config = json.loads(file.read(_MAX_CONFIG))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) and "num_attention_heads" in config else {}


def _stored(file: TorchFile, tensor: Tensor) -> Stored:
    return Stored(tensor.shape, tensor.dtype.name, lambda: file.read(tensor))


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[dict[str, Stored]]:
    """Arrays of a safetensors file, whose header has each name once."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER:
                raise Refused(f"its header claims {size:,} bytes, more than {_MAX_HEADER:,}")
            _check_names(file.read(size))
        with safe_open(path, framework="numpy") as file:
            stored = {}
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
                stored[name] = Stored(tuple(part.get_shape()), dtype, lambda name=name: file.get_tensor(name))
            yield stored
    except Refused as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (SafetensorError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: {reason}") from error


def _check_names(header: bytes) -> None:
    """What readers take silently: one name for several arrays."""
    try:
        json.loads(header, object_pairs_hook=_without_duplicates)
    except Refused:
        raise
    except (ValueError, RecursionError):  # told by the reader of the arrays
        return


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise Refused(f"the name {max(names, key=names.count)[:100]!r} stands twice in its header")
    return dict(pairs)


def _as_upstream(stored: dict[str, Stored]) -> dict[str, Stored]:
    """diffusers' names as upstream's; others are left as they are."""
    if not any(name.startswith("transformer_blocks.") for name in stored):
        return stored
    found: dict[str, Stored] = {}
    copies: dict[str, list[Stored]] = {}
    for name, array in stored.items():
        stem, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        if name == "pos_embed.pos_embed":
            found["pos_embed"] = array
        elif block is None:
            found[f"{_DIFFUSERS_TOP.get(stem, stem)}.{leaf}"] = array
        elif block[2] in _DIFFUSERS_SHARED:
            copies.setdefault(f"{_DIFFUSERS_SHARED[block[2]]}.{leaf}", []).append(array)
        elif block[2] == _QKV[0]:
            parts = [stored.get(f"transformer_blocks.{block[1]}.{part}.{leaf}") for part in _QKV]
            found[f"blocks.{block[1]}.attn.qkv.{leaf}"] = _fused(parts, name)
        elif block[2] not in _QKV:
            found[f"blocks.{block[1]}.{_DIFFUSERS_BLOCK.get(block[2], block[2])}.{leaf}"] = array
    return found | {name: _agreed(arrays, name) for name, arrays in copies.items()}


def _agreed(arrays: list[Stored], name: str) -> Stored:
    """One array for several that must be equal; they are compared when it is read."""

    def read() -> np.ndarray:
        array = arrays[0].read()
        if not all(np.array_equal(array, other.read()) for other in arrays[1:]):
            raise Refused(f"the blocks have different copies of {name}; our DiT has one for all")
        return array

    return Stored(arrays[0].shape, arrays[0].dtype, read)


def _fused(parts: list[Stored | None], name: str) -> Stored:
    """Arrays one below the other."""
    whole = [part for part in parts if part is not None and part.shape]
    if len(whole) < len(parts) or len({(part.shape, part.dtype) for part in whole}) > 1:
        raise Refused(f"beside {name}, to_k or to_v is missing or of another shape or dtype")
    shape = (sum(part.shape[0] for part in whole), *whole[0].shape[1:])
    return Stored(shape, whole[0].dtype, lambda: np.concatenate([part.read() for part in whole]))
