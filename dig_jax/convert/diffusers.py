"""Map diffusers' DiTTransformer2DModel to the released DiT and back: names and config.json.

Unlike DiT, diffusers keeps a copy of the time and label embeddings in each block, uses separate matrices for
queries, keys and values, and does not save the position table.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dig_jax.errors import InvalidFile
from dig_jax.files.safetensors import StoredArray
from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.dit import DiTOptions

# diffusers → upstream. A name covers the weight and the bias.
_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_SHARED = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_CLASSES = {"DiT": "DiTTransformer2DModel"}  # by model family
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def as_upstream(stored: Mapping[str, StoredArray]) -> Mapping[str, StoredArray]:
    """Rename diffusers' arrays to upstream's. Arrays with other names are returned unchanged.

    Raises:
        InvalidFile: mismatched queries, keys and values; or, when an embedding is read, copies that differ.
    """
    if not any(name.startswith("transformer_blocks.") for name in stored):
        return stored
    found: dict[str, StoredArray] = {}
    copies: dict[str, list[StoredArray]] = {}
    for name, array in stored.items():
        stem, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        if name == "pos_embed.pos_embed":
            found["pos_embed"] = array
        elif block is None:
            found[f"{_TOP.get(stem, stem)}.{leaf}"] = array
        elif block[2] in _SHARED:
            copies.setdefault(f"{_SHARED[block[2]]}.{leaf}", []).append(array)
        elif block[2] == _QKV[0]:
            arrays = [stored.get(f"transformer_blocks.{block[1]}.{qkv}.{leaf}") for qkv in _QKV]
            found[f"blocks.{block[1]}.attn.qkv.{leaf}"] = _concatenated(arrays, name)
        elif block[2] not in _QKV:
            found[f"blocks.{block[1]}.{_BLOCK.get(block[2], block[2])}.{leaf}"] = array
    return found | {name: _agreed(arrays, name) for name, arrays in copies.items()}


def from_upstream(arrays: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """Rename upstream's arrays of a DiT to diffusers'."""
    return {name: array for item in arrays.items() for name, array in _renamed(*item, depth)}


def config_of(model: DiffusionTransformer, process: str) -> dict[str, Any]:
    """Return diffusers' config.json of a model.

    Args:
        model: may be abstract.
        process: `config.diffusion.process`, with which the model was trained.

    Raises:
        ValueError: the model is not a DiT with classes and the options of the paper, or not of DDPM.
    """
    if model.family not in _CLASSES or not model.num_classes:
        raise ValueError(
            "unsupported model for diffusers' DiTTransformer2DModel; expected a DiT with classes (upstream's"
            " names in FILE.safetensors or FILE.pt support every model)"
        )
    if process != "ddpm":
        raise ValueError(
            f"unsupported diffusion.process={process!r} for diffusers; expected 'ddpm', which its DiTPipeline"
            " samples"
        )
    options = model.options
    assert isinstance(options, DiTOptions)
    modern = {"norm": "layer", "mlp": "gelu", "qk_norm": False, "rope": False}
    for name, expected in modern.items():
        if (value := getattr(options, name)) != expected:
            raise ValueError(f"unsupported {name}={value!r} for diffusers; expected {expected!r}")
    heads = options.num_heads
    return {
        "_class_name": _CLASSES[model.family],
        "num_attention_heads": heads,
        "attention_head_dim": model.hidden_size // heads,
        "in_channels": model.in_channels,
        "out_channels": model.in_channels * (2 if model.learn_sigma else 1),
        "num_layers": model.blocks.depth,
        "sample_size": model.input_size[0],
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": model.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
    }


def _renamed(name: str, array: np.ndarray, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield diffusers' arrays for one of upstream's."""
    top, inner, shared = (
        {ours: theirs for theirs, ours in names.items()} for names in (_TOP, _BLOCK, _SHARED)
    )
    stem, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if stem in top:
        yield f"{top[stem]}.{leaf}", array
    elif stem in shared:
        for number in range(depth):
            yield f"transformer_blocks.{number}.{shared[stem]}.{leaf}", array
    elif block and block[2] == "attn.qkv":
        for qkv, matrix in zip(_QKV, np.split(array, 3), strict=True):
            yield f"transformer_blocks.{block[1]}.{qkv}.{leaf}", matrix
    elif block:
        yield f"transformer_blocks.{block[1]}.{inner[block[2]]}.{leaf}", array


def _agreed(arrays: list[StoredArray], name: str) -> StoredArray:
    """Return one array for several copies. Reading it checks that the copies are equal."""

    def read() -> np.ndarray:
        array = arrays[0].read()
        if not all(np.array_equal(array, other.read()) for other in arrays[1:]):
            raise InvalidFile(f"copies of {name} differ between blocks; expected equal copies")
        return array

    return StoredArray(arrays[0].shape, arrays[0].dtype, read)


def _concatenated(arrays: list[StoredArray | None], name: str) -> StoredArray:
    """Concatenate queries, keys and values along the first axis."""
    found = [array for array in arrays if array is not None and array.shape]
    if len(found) < len(arrays) or len({(array.shape, array.dtype) for array in found}) > 1:
        raise InvalidFile(f"to_k or to_v does not match {name}; expected equal shapes and dtypes")
    shape = (sum(array.shape[0] for array in found), *found[0].shape[1:])
    return StoredArray(shape, found[0].dtype, lambda: np.concatenate([array.read() for array in found]))
