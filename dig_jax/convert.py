"""PyTorch checkpoints into our models: the map of names is data.

Linear weights are transposed. Upstream's DiG turns the tokens from block to block where we keep raster
order, so its 3×3 kernels are turned instead: by 180° in blocks i mod 4 = 1, transposed in 2, both in 3.
"""

from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dig_jax.models.dig import DIRECTIONS, DiG
from dig_jax.models.embeddings import sincos_positions
from dig_jax.models.transformer import DiffusionTransformer

# ours → theirs; a name stands for its weight (kernel) and, where ours has one, its bias.
_TOP = {
    "patch_embed": "x_embedder.proj",
    "time_embed.hidden": "t_embedder.mlp.0",
    "time_embed.out": "t_embedder.mlp.2",
    "label_embed.table": "y_embedder.embedding_table",
    "final.modulation.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}
_BLOCK = {
    "mixer.q_proj": "attn.q_proj",
    "mixer.k_proj": "attn.k_proj",
    "mixer.v_proj": "attn.v_proj",
    "mixer.gate_proj": "attn.g_proj",
    "mixer.decay_down": "attn.gk_proj.0",
    "mixer.decay_up": "attn.gk_proj.1",
    "mixer.norm_weight": "attn.g_norm_swish_gate.weight",
    "mixer.o_proj": "attn.o_proj",
    "mlp.gate_up": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
    "conv": "dw_conv",
    "norm1": "norm1",
    "norm2": "norm2",
    "modulation.linear": "adaLN_modulation.1",
}
_DIT_BLOCK = _BLOCK | {
    "mixer.qkv_proj": "attn.qkv",
    "mixer.o_proj": "attn.proj",
    "mlp.hidden": "mlp.fc1",
    "mlp.out": "mlp.fc2",
}
_LEAVES = {"kernel": "weight", "embedding": "weight", "weight": "weight", "bias": "bias"}


def load_torch_state_dict(
    model: DiffusionTransformer, state_dict: Mapping[str, np.ndarray]
) -> DiffusionTransformer:
    """Loads upstream's parameters (DiG's or DiT's released code) into `model`, in place and strictly.

    Args:
        model: from `create_model`, with the switches that the parameters were trained with.
        state_dict: {name: array} with PyTorch's names and layouts. `pos_embed` is fixed: it is compared
            with ours, not loaded. RMSNorm weights stand under two names each, which must agree.

    Raises:
        ValueError: names are missing or left over, or a shape differs; the model is then unchanged.
    """
    if isinstance(model, DiG) and model.blocks.depth % model.directions:
        raise ValueError(
            f"depth {model.blocks.depth} is not a multiple of directions={model.directions}: upstream's"
            " output is then turned, and its parameters mean something else here"
        )
    arrays = {name: np.asarray(value) for name, value in state_dict.items()}
    _check_positions(model, arrays.pop("pos_embed", None))
    for block in range(model.blocks.depth):
        for ours, alias in (("norm1", "attn_norm"), ("norm2", "mlp_norm")):
            alias = arrays.pop(f"blocks.{block}.{alias}.weight", None)
            weight = arrays.get(f"blocks.{block}.{ours}.weight")
            if alias is not None and not np.array_equal(alias, weight):
                raise ValueError(f"blocks.{block}: the two names of {ours}.weight hold different values")

    _, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    loaded, wrong, missing, used = [], [], [], set()
    for path, variable in flat:
        pieces = list(_torch_pieces(model, path, variable.shape))
        used.update(name for name, _ in pieces)
        absent = [name for name, _ in pieces if name not in arrays]
        missing += absent
        if absent:
            continue
        values = [convert(arrays[name].astype(np.float32)) for name, convert in pieces]
        shape = variable.shape[1:] if _stacked(path) else variable.shape
        wrong += [
            f"{name} {arrays[name].shape}"
            for (name, _), value in zip(pieces, values, strict=True)
            if value.shape != shape
        ]
        loaded.append((path, values if _stacked(path) else values[0]))
    unexpected = sorted(set(arrays) - used)
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(problems.values()):
        told = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        raise ValueError("the parameters do not fit the model; " + "; ".join(told))
    values = dict(loaded)
    replaced = [(path, variable.replace(jnp.asarray(np.array(values[path])))) for path, variable in flat]
    nnx.update(model, nnx.from_flat_state(replaced))
    return model


def _stacked(path: tuple) -> bool:
    return path[:2] in (("blocks", "groups"), ("blocks", "skips"))


def _torch_pieces(
    model: DiffusionTransformer, path: tuple, shape: tuple[int, ...]
) -> Iterator[tuple[str, Callable]]:
    """The (name, conversion) of each PyTorch array that makes up one of our leaves, in stacking order."""
    depth, period = model.blocks.depth, model.blocks.period
    if path[:2] == ("blocks", "groups"):
        blocks, inner = range(path[2], depth // period * period, period), path[3:]
    elif path[:2] == ("blocks", "skips"):
        blocks, inner = range(depth // 2 + 1, depth), ("skip_linear", *path[2:])
    elif path[:2] == ("blocks", "rest"):
        blocks, inner = (depth // period * period + path[2],), path[3:]
    else:
        yield _torch_name(_TOP, path), _conversion(model, path, None)
        return
    names = _BLOCK if isinstance(model, DiG) else _DIT_BLOCK
    for block in blocks:
        yield f"blocks.{block}.{_torch_name(names, inner)}", _conversion(model, inner, block)


def _torch_name(names: Mapping[str, str], path: tuple) -> str:
    whole, stem, leaf = ".".join(path), ".".join(path[:-1]), path[-1]
    return names.get(whole) or f"{names.get(stem, stem)}.{_LEAVES[leaf]}"


def _conversion(model: DiffusionTransformer, path: tuple, block: int | None) -> Callable:
    if path[-1] != "kernel":
        return lambda array: array
    if path == ("patch_embed", "kernel"):
        return lambda array: array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if path == ("conv", "kernel"):
        return lambda array: _turn_kernel(array[:, 0].transpose(1, 2, 0), block % model.directions)
    return np.transpose


def _turn_kernel(kernel: np.ndarray, direction: int) -> np.ndarray:
    """A [3, 3, D] kernel of the turned frame of a scan direction, in raster order."""
    name = DIRECTIONS[direction]
    if name.startswith("column"):
        kernel = kernel.transpose(1, 0, 2)
    return kernel[::-1, ::-1] if name.endswith("reversed") else kernel


def _check_positions(model: DiffusionTransformer, theirs: np.ndarray | None) -> None:
    if theirs is None:
        return
    ours = sincos_positions(tuple(size // model.patch_size for size in model.input_size), model.hidden_size)
    if theirs.shape[1:] != ours.shape or not np.allclose(theirs[0], ours, atol=1e-5):
        raise ValueError(
            f"pos_embed {theirs.shape} is not the fixed sin-cos table of this model's input"
            f" {model.input_size} and patch_size={model.patch_size}"
        )
