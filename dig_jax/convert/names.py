"""Map parameter names and layouts of the released PyTorch code of DiG, DiT and DiS to ours and back.

Linear weights are transposed. Upstream's DiG rotates the tokens from block to block; we keep raster order and
rotate its 3×3 kernels instead: by 180° in blocks i mod 4 = 1, transposed in 2, both in 3.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dig_jax.convert import dis
from dig_jax.files.safetensors import StoredArray
from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.dig import DIRECTIONS
from dig_jax.models.embeddings import sincos_positions

# Ours → upstream. A name covers the weight (kernel) and the bias, if there is one.
_TOP = {
    "patch_embed": "x_embedder.proj",
    "time_embed.hidden": "t_embedder.mlp.0",
    "time_embed.out": "t_embedder.mlp.2",
    "label_embed.table": "y_embedder.embedding_table",
    "final.modulation.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
    "final.norm": "final_layer.norm_final",
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
    "skip_linear": "skip_linear",
}
_DIT_BLOCK = _BLOCK | {
    "mixer.qkv_proj": "attn.qkv",
    "mixer.o_proj": "attn.proj",
    "mixer.q_norm": "attn.q_norm",
    "mixer.k_norm": "attn.k_norm",
    "mlp.hidden": "mlp.fc1",
    "mlp.out": "mlp.fc2",
    # LightningDiT's
    "mlp.gate_up": "mlp.w12",
    "mlp.down": "mlp.w3",
}
_BLOCKS = {"DiG": _BLOCK, "DiT": _DIT_BLOCK, "DiS": dis.BLOCK}  # by model family
# Options that shapes do not show, or that upstream's code does not have.
_UPSTREAM = {
    "mixer": "gla",
    "gate_normalizer": 16.0,
    "class_tokens": 0,
    "patch_bottleneck": None,
    "flow_map": False,
}
_ROTATED = (("mixer", "qkv_proj"), ("mixer", "q_norm"), ("mixer", "k_norm"))
_LEAVES = {"kernel": "weight", "embedding": "weight", "weight": "weight", "bias": "bias"}
# Tables that depend only on the sizes of the model.
_TABLES = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
# Upstream saves each RMSNorm under a second name.
_ALIASES = {"norm1": "attn_norm", "norm2": "mlp_norm"}
# float32 represents all exactly but float64, which is rounded.
_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One of the PyTorch arrays that make up one of our leaves, with conversions both ways."""

    name: str
    shape: tuple[int, ...]
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_upstream: Callable[[np.ndarray], np.ndarray]


def load_torch_state_dict(
    model: DiffusionTransformer, state_dict: Mapping[str, np.ndarray]
) -> DiffusionTransformer:
    """Load parameters of the released DiG, DiT or DiS code into `model`, in place and strictly.

    Args:
        model: from `create_model`, with the options that the parameters were trained with.
        state_dict: {name: array} with PyTorch's names and layouts. `pos_embed` is checked, not loaded, but
            for DiS, which learns it.
            Upstream saves each RMSNorm weight under two names; both must have equal values.

    Returns:
        `model`.

    Raises:
        ValueError: missing or unexpected names, wrong shapes, or non-finite values; the model is unchanged.
    """
    arrays = {name: np.asarray(value) for name, value in state_dict.items()}
    stored = {name: StoredArray(x.shape, "float32", lambda x=x: x) for name, x in arrays.items()}
    params = read_params(model, stored)
    replaced = [
        (path, variable.replace(jnp.asarray(params[path])))
        for path, variable in nnx.to_flat_state(nnx.split(model)[1])
    ]
    nnx.update(model, nnx.from_flat_state(replaced))
    return model


def to_torch_state_dict(model: DiffusionTransformer) -> dict[str, np.ndarray]:
    """Return the parameters of `model` under upstream's names; `load_torch_state_dict` inverts it exactly.

    Raises:
        ValueError: the upstream code does not support the model.
    """
    flat = nnx.to_flat_state(nnx.split(model)[1])
    return torch_arrays(model, {path: np.asarray(variable[...]) for path, variable in flat})


def read_params(model: DiffusionTransformer, stored: Mapping[str, StoredArray]) -> dict[tuple, np.ndarray]:
    """Return our float32 leaves by path. Names, shapes and dtypes are checked before any array is read.

    Args:
        model: may be abstract; only its shapes and options are used.
        stored: upstream's arrays by name.

    Raises:
        ValueError: as in `load_torch_state_dict`.
    """
    _check_supported(model)
    shapes = _shapes(model)
    pieces = {path: list(_pieces(model, path, shape)) for path, shape in shapes.items()}
    expected = {piece.name: piece.shape for group in pieces.values() for piece in group}
    _compare(stored, expected)
    if "pos_embed" not in expected:
        _check_positions(model, stored)
    params = {}
    for path, group in pieces.items():
        leaf = params[path] = np.empty(shapes[path], np.float32)
        for index, piece in enumerate(group):
            leaf[index if _stacked(path) else ...] = piece.to_ours(_read(stored, piece.name))
    return params


def torch_arrays(model: DiffusionTransformer, params: Mapping[tuple, np.ndarray]) -> dict[str, np.ndarray]:
    """Return upstream's arrays by name, from our leaves by path; the inverse of `read_params`.

    Raises:
        ValueError: the upstream code does not support the model.
    """
    _check_supported(model)
    if (time_input := getattr(model.options, "time_input", "steps")) != "steps":
        raise ValueError(f"unsupported time_input={time_input!r}; expected 'steps'")
    rows, columns = model.input_size
    if rows != columns:
        raise ValueError(
            f"unsupported input size for upstream's models: got {rows}×{columns}; expected a square"
        )
    learned = ("positions",) in params
    arrays = {} if learned else {"pos_embed": _positions(model)[None]}
    for path, leaf in params.items():
        for index, piece in enumerate(_pieces(model, path, leaf.shape)):
            array = piece.to_upstream(leaf[index] if _stacked(path) else leaf)
            arrays[piece.name] = np.ascontiguousarray(array, np.float32)
            if alias := _alias(piece.name):
                arrays[alias] = arrays[piece.name]
    return arrays


def _num_frames(model: DiffusionTransformer) -> int:
    """Return the number of orientations of upstream's tokens, one per scan direction."""
    return getattr(model.options, "directions", 1)


def _check_supported(model: DiffusionTransformer) -> None:
    if model.family not in _BLOCKS:
        raise ValueError(f"unsupported model family: got {model.family}; expected {' or '.join(_BLOCKS)}")
    required = _UPSTREAM | ({"mlp": "swiglu"} if model.family == "DiG" else {})
    for name, expected in required.items():
        if (value := getattr(model.options, name, expected)) != expected:
            raise ValueError(f"unsupported {name}={value!r}; expected {expected!r}, as in upstream's code")
    if model.options.internal_head is not None:
        raise ValueError(
            f"unsupported internal_head={model.options.internal_head}; expected None, because"
            " upstream's models have no internal head"
        )
    if model.blocks.depth % _num_frames(model):
        raise ValueError(
            f"unsupported depth: got {model.blocks.depth}; expected a multiple of directions="
            f"{_num_frames(model)}, because upstream's output is rotated otherwise"
        )


def _shapes(model: DiffusionTransformer) -> dict[tuple, tuple[int, ...]]:
    return {path: variable.shape for path, variable in nnx.to_flat_state(nnx.split(model)[1])}


def _compare(stored: Mapping[str, StoredArray], expected: Mapping[str, tuple[int, ...]]) -> None:
    aliases = {alias for name in expected if (alias := _alias(name))}
    problems = {
        "missing": sorted(expected.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - expected.keys() - aliases - _TABLES),
        "wrong shape": [
            f"{name} {stored[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ],
        "unsupported dtype": [
            f"{name} {array.dtype}" for name, array in stored.items() if array.dtype not in _FLOATS
        ],
    }
    if any(problems.values()):
        found = [f"{problem}: {_first(names)}" for problem, names in problems.items() if names]
        raise ValueError("parameters do not match the model: " + "; ".join(found))


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(name[:150] for name in names[:4]) + more


def _read(stored: Mapping[str, StoredArray], name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # an infinite value is reported below
        array = stored[name].read().astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has non-finite values")
    alias = _alias(name)
    if (
        alias is not None
        and alias in stored
        and not np.array_equal(stored[alias].read().astype(np.float32), array)
    ):
        raise ValueError(f"{name} and {alias} differ; expected equal copies of one weight")
    return array


def _alias(name: str) -> str | None:
    """Return the second name of an RMSNorm weight: blocks.3.attn_norm.weight for blocks.3.norm1.weight."""
    parts = name.split(".")
    if len(parts) == 4 and parts[2] in _ALIASES:
        return ".".join([*parts[:2], _ALIASES[parts[2]], parts[3]])
    return None


def _stacked(path: tuple) -> bool:
    return path[0] == "blocks" and path[1] in ("groups", "skips", "inward", "outward")


def _pieces(model: DiffusionTransformer, path: tuple, shape: tuple[int, ...]) -> Iterator[_Piece]:
    """Yield the PyTorch arrays that make up one of our leaves, in stacking order."""
    inner_shape = shape[1:] if _stacked(path) else shape
    if model.family == "DiS":
        if path[0] != "blocks":
            yield _piece(model, _torch_name(dis.TOP, path), path, shape, 0)
            return
        blocks, inner = dis.blocks(path, model.blocks.depth)
        for block in blocks:
            yield _piece(model, f"{block}.{_torch_name(dis.BLOCK, inner)}", inner, inner_shape, 0)
        return
    depth, period = model.blocks.depth, model.blocks.period
    if path[:2] == ("blocks", "groups"):
        blocks, inner = range(path[2], depth // period * period, period), path[3:]
    elif path[:2] == ("blocks", "skips"):
        blocks, inner = range(depth // 2 + 1, depth), ("skip_linear", *path[2:])
    elif path[:2] == ("blocks", "rest"):
        blocks, inner = (depth // period * period + path[2],), path[3:]
    else:
        yield _piece(model, _torch_name(_TOP, path), path, shape, 0)
        return
    names = _BLOCKS[model.family]
    for block in blocks:
        name = f"blocks.{block}.{_torch_name(names, inner)}"
        yield _piece(model, name, inner, inner_shape, block)


def _torch_name(names: Mapping[str, str], path: tuple) -> str:
    whole, stem, leaf = ".".join(path), ".".join(path[:-1]), path[-1]
    if whole in names:
        return names[whole]
    if stem not in names or leaf not in _LEAVES:
        raise ValueError(f"unsupported parameter: got {whole}; expected those of upstream's models")
    return f"{names[stem]}.{_LEAVES[leaf]}"


def _piece(model: DiffusionTransformer, name: str, path: tuple, shape: tuple[int, ...], block: int) -> _Piece:
    if path == ("patch_embed", "kernel"):
        p, c = model.patch_size, model.in_channels
        return _Piece(
            name,
            (shape[1], c, p, p),
            lambda array: array.transpose(2, 3, 1, 0).reshape(shape),
            lambda array: array.reshape(p, p, c, -1).transpose(3, 2, 0, 1),
        )
    if path == ("conv", "kernel"):
        direction = block % _num_frames(model)
        return _Piece(
            name,
            (shape[2], 1, *shape[:2]),
            lambda array: _rotated(array[:, 0].transpose(1, 2, 0), direction),
            lambda array: _rotated(array, direction).transpose(2, 0, 1)[:, None],
        )
    if path[-2:] == ("conv", "kernel"):  # of a sequence
        return _Piece(
            name, (shape[1], 1, shape[0]), lambda array: array[:, 0].T, lambda array: array.T[:, None]
        )
    if path == ("positions",):
        return _Piece(name, (1, *shape), lambda array: array[0], lambda array: array[None])
    if getattr(model.options, "rope", False) and path[:2] in _ROTATED:
        order = _rotary_order(model.options.num_heads, shape[-1], 3 if path[1] == "qkv_proj" else 1)
        back = np.argsort(order)
        return _Piece(name, shape[::-1], lambda array: array[order].T, lambda array: array.T[back])
    if path[-1] == "kernel":
        return _Piece(name, shape[::-1], np.transpose, np.transpose)
    return _Piece(name, shape, np.asarray, np.asarray)


def _rotary_order(heads: int, size: int, matrices: int) -> np.ndarray:
    """Return upstream's channel for each of ours: it rotates (2i, 2i + 1), we rotate (i, i + half).

    Args:
        heads: number of heads.
        size: number of channels: those of one head, or of three matrices, of which v is not rotated.
        matrices: 3 for all heads of q, k and v, 1 for the norm of one head.
    """
    if matrices == 1:
        return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    head = size // 3 // heads
    pairs = _rotary_order(heads, head, 1)
    rotated = (np.arange(2 * heads)[:, None] * head + pairs).ravel()
    return np.concatenate([rotated, np.arange(len(rotated), size)])


def _rotated(kernel: np.ndarray, direction: int) -> np.ndarray:
    """Convert a [3, 3, D] kernel from upstream's rotated frame to raster order, or back."""
    name = DIRECTIONS[direction]
    if name.startswith("column"):
        kernel = kernel.transpose(1, 0, 2)
    return kernel[::-1, ::-1] if name.endswith("reversed") else kernel


def _positions(model: DiffusionTransformer) -> np.ndarray:
    height, width = model.input_size
    grid = (height // model.patch_size, width // model.patch_size)
    return sincos_positions(grid, model.hidden_size)


def _check_positions(model: DiffusionTransformer, stored: Mapping[str, StoredArray]) -> None:
    if "pos_embed" not in stored:
        return
    theirs = stored["pos_embed"]
    tokens = math.prod(size // model.patch_size for size in model.input_size)
    if theirs.shape != (1, tokens, model.hidden_size) or not np.allclose(
        theirs.read().astype(np.float32)[0],
        _positions(model),
        atol=max(1e-5, float(jnp.finfo(theirs.dtype).eps)),  # rounding of a sine
    ):
        raise ValueError(
            f"invalid pos_embed of shape {theirs.shape}; expected the sin-cos table for input size"
            f" {model.input_size} and patch_size={model.patch_size}"
        )
