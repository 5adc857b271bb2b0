"""diffusers' DiTTransformer2DModel as the released DiT, and back: names, and the config beside the weights.

Each of its blocks has its own copy of the embeddings of time and labels, where DiT has one for all; its
queries, keys and values are three matrices; its table of positions is not saved.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dig_jax.errors import InvalidFile
from dig_jax.files.safetensors import StoredArray
from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.dit import DiT

# diffusers' → upstream's; a name stands for its weight and its bias.
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
WEIGHTS = "diffusion_pytorch_model.safetensors"
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def as_upstream(stored: Mapping[str, StoredArray]) -> Mapping[str, StoredArray]:
    """diffusers' names as upstream's; others are left as they are.

    Raises:
        InvalidFile: queries, keys and values do not fit together; and, when it is read, an embedding of which
            the blocks have different copies.
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
            parts = [stored.get(f"transformer_blocks.{block[1]}.{part}.{leaf}") for part in _QKV]
            found[f"blocks.{block[1]}.attn.qkv.{leaf}"] = _fused(parts, name)
        elif block[2] not in _QKV:
            found[f"blocks.{block[1]}.{_BLOCK.get(block[2], block[2])}.{leaf}"] = array
    return found | {name: _agreed(arrays, name) for name, arrays in copies.items()}


def from_upstream(arrays: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """A DiT's arrays as diffusers saves them, of upstream's by their names."""
    return {name: array for item in arrays.items() for name, array in _renamed(*item, depth)}


def config_of(model: DiffusionTransformer) -> dict[str, Any]:
    """What diffusers' config.json says of a model.

    Raises:
        ValueError: diffusers has no such model.
    """
    if not isinstance(model, DiT) or not model.num_classes:
        raise ValueError(
            "diffusers' DiTTransformer2DModel is a DiT with classes, and this is none;"
            " give FILE.safetensors or FILE.pt, for upstream's names"
        )
    heads = model.blocks.groups[0].mixer.num_heads
    return {
        "_class_name": "DiTTransformer2DModel",
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
        for part, piece in zip(_QKV, np.split(array, 3), strict=True):
            yield f"transformer_blocks.{block[1]}.{part}.{leaf}", piece
    elif block:
        yield f"transformer_blocks.{block[1]}.{inner[block[2]]}.{leaf}", array


def _agreed(arrays: list[StoredArray], name: str) -> StoredArray:
    """One array for several that must be equal; they are compared when it is read."""

    def read() -> np.ndarray:
        array = arrays[0].read()
        if not all(np.array_equal(array, other.read()) for other in arrays[1:]):
            raise InvalidFile(f"the blocks have different copies of {name}; our DiT has one for all")
        return array

    return StoredArray(arrays[0].shape, arrays[0].dtype, read)


def _fused(parts: list[StoredArray | None], name: str) -> StoredArray:
    """Arrays one below the other."""
    whole = [part for part in parts if part is not None and part.shape]
    if len(whole) < len(parts) or len({(part.shape, part.dtype) for part in whole}) > 1:
        raise InvalidFile(f"beside {name}, to_k or to_v is missing or of another shape or dtype")
    shape = (sum(part.shape[0] for part in whole), *whole[0].shape[1:])
    return StoredArray(shape, whole[0].dtype, lambda: np.concatenate([part.read() for part in whole]))
