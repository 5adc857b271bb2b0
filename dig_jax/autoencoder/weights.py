"""Read trained autoencoders strictly, from a folder, a file or the Hugging Face Hub."""

import dataclasses
import functools
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dig_jax.autoencoder.model import Autoencoder
from dig_jax.autoencoder.networks import AutoencoderArchitecture
from dig_jax.errors import CheckpointError, InvalidFile, one_line
from dig_jax.files import hub
from dig_jax.files.json_file import read_json
from dig_jax.files.paths import Path, to_path
from dig_jax.files.safetensors import StoredArray
from dig_jax.files.weights import WEIGHTS_FILE, find_weights, open_weights
from dig_jax.rngs import make_rngs

CONFIG_FILE = "config.json"
# Config fields that describe other networks, and their values for this one.
_FIXED = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Names of attention layers before diffusers 0.16, which the published files use.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_MAX_CONFIG = 2**20  # bytes


def load(path_or_name: str | os.PathLike, *, dtype: DTypeLike = jnp.float32) -> Autoencoder:
    """Load an autoencoder in diffusers' format, such as `stabilityai/sd-vae-ft-ema` or `-mse`.

    Args:
        path_or_name: a folder that diffusers wrote, of the autoencoder or of a pipeline with one; a file of
            weights next to its config.json; or a Hugging Face repository id (owner/name).
        dtype: dtype of activations and matrix products; parameters are float32.

    Raises:
        CheckpointError: the files are missing, unreadable, or do not match the config exactly.
    """
    config_path, weights_path = _find(path_or_name)
    config = _read_config(config_path)
    graphdef, state = _abstract(config, jnp.dtype(dtype))
    flat = nnx.to_flat_state(state)
    arrays = _read_weights(weights_path, {path: variable.shape for path, variable in flat})
    loaded = [(path, variable.replace(arrays[path])) for path, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


@functools.lru_cache(maxsize=4)
def _abstract(config: AutoencoderArchitecture, dtype: DTypeLike) -> tuple[Any, Any]:
    """Return the network without values, which are read only."""
    return nnx.split(nnx.eval_shape(lambda: Autoencoder(config, dtype=dtype, rngs=make_rngs(0))))


def _find(path_or_name: str | os.PathLike) -> tuple[Path, Path]:
    """Return the paths of the config and the weights."""
    path = to_path(path_or_name)
    if path.is_dir():
        path = find_weights(path, "vae")
        return path.with_name(CONFIG_FILE), path
    if path.exists():
        return path.with_name(CONFIG_FILE), path
    if not hub.is_repository(str(path_or_name)):
        raise CheckpointError(
            f"invalid autoencoder {str(path)!r}; expected an existing path or a Hugging Face repository id"
            " (owner/name)"
        )
    try:
        config, weights = (hub.download(str(path_or_name), file) for file in (CONFIG_FILE, WEIGHTS_FILE))
    except CheckpointError as error:
        raise CheckpointError(
            f"no such path: autoencoder {path_or_name}, and {error}; without a network, use a folder with"
            f" {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    return config, weights


def _read_config(path: Path) -> AutoencoderArchitecture:
    try:
        fields = read_json(path, max_bytes=_MAX_CONFIG)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"no such file: {path}; expected the autoencoder's sizes and scaling factor"
        ) from error
    except (OSError, InvalidFile) as error:
        raise CheckpointError(f"cannot read {path}: {one_line(error)}") from error
    try:
        _check_network(fields)
        return AutoencoderArchitecture(**_sizes(fields))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_network(fields: Mapping[str, Any]) -> None:
    """Raise ValueError if a config describes another kind of network."""
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"unsupported {name}={reprlib.repr(fields[name])}; expected {value!r}")
    for name, value in _BLOCK_TYPES.items():
        types = fields.get(name, [value])
        if not isinstance(types, list) or any(kind != value for kind in types):
            raise ValueError(f"unsupported {name}={reprlib.repr(types)}; expected {value!r} only")


def _sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {}
    for field in dataclasses.fields(AutoencoderArchitecture):
        if field.name in fields:
            value = fields[field.name]
            sizes[field.name] = tuple(value) if isinstance(value, list) else value
            if not _same_kind(sizes[field.name], field.default):
                raise ValueError(
                    f"invalid {field.name}={reprlib.repr(value)}; expected a value such as {field.default!r}"
                )
    return sizes


def _same_kind(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_same_kind(item, default[0]) for item in value)
    return type(value) in ((int, float) if isinstance(default, float) else (int,))


def _read_weights(path: Path, shapes: Mapping[tuple, tuple[int, ...]]) -> dict[tuple, Array]:
    """Return float32 arrays by their path in the module; all names, shapes and dtypes are checked first."""
    with open_weights(path) as weights:
        try:
            arrays = weights.below("")
            names = _match(arrays, shapes)
            return {ours: _converted(name, arrays[name].read(), shapes[ours]) for ours, name in names.items()}
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _match(stored: Mapping[str, StoredArray], shapes: Mapping[tuple, tuple[int, ...]]) -> dict[tuple, str]:
    """Return the name in the file for each path in the module."""
    names, missing, wrong = {}, [], []
    for path, shape in shapes.items():
        name = next((name for name in _torch_names(path) if name in stored), None)
        if name is None:
            missing.append(_torch_names(path)[0])
            continue
        names[path] = name
        array, expected = stored[name], _torch_shapes(shape)
        if array.shape not in expected:
            wrong.append(f"{name} has shape {list(array.shape)} (expected {list(expected[0])})")
        elif array.dtype not in _DTYPES:
            wrong.append(f"{name} is {array.dtype} (expected {', '.join(_DTYPES)})")
    unexpected = sorted(set(stored) - set(names.values()))
    problems = {"missing": missing, "unexpected": unexpected, "wrong": wrong}
    if any(problems.values()):
        listed = [f"{kind}: {_few(items)}" for kind, items in problems.items() if items]
        raise ValueError(f"arrays do not match {CONFIG_FILE}; {'; '.join(listed)}")
    return names


def _torch_names(path: tuple) -> list[str]:
    """Return the names that an array may have in a file."""
    *parts, leaf = path
    resample = {"encoder": "downsamplers.0", "decoder": "upsamplers.0"}.get(path[0])
    renamed = {"resample": resample, "to_out": "to_out.0"}
    parts = [renamed.get(part, str(part)) for part in parts]
    leaf = "bias" if leaf == "bias" else "weight"
    names = [parts]
    if parts[-1] in _OLD_NAMES:
        names.append([*parts[:-1], _OLD_NAMES[parts[-1]]])
    return [".".join([*name, leaf]) for name in names]


def _torch_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes that an array may have in a file; linear maps may be stored as 1×1 convolutions."""
    if len(shape) == 4:
        return [(shape[3], shape[2], *shape[:2])]
    return [shape[::-1], (*shape[::-1], 1, 1)] if len(shape) == 2 else [shape]


def _converted(name: str, array: np.ndarray, shape: tuple[int, ...]) -> Array:
    with np.errstate(over="ignore"):  # an infinite value is reported below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has non-finite values")
    if len(shape) == 4:
        return jnp.asarray(array.transpose(2, 3, 1, 0))
    return jnp.asarray(array.reshape(shape[::-1]).T)


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(item[:150] for item in items[:4]) + more
