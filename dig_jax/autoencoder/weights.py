"""Trained weights of an autoencoder, from a folder, a file or the Hub: strictly, or not at all."""

import dataclasses
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from dig_jax.autoencoder.model import Autoencoder
from dig_jax.autoencoder.networks import AutoencoderArchitecture
from dig_jax.errors import CheckpointError
from dig_jax.files.safetensors import StoredArray, open_safetensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
# What a config may say of networks that are not this one, and how it says that they are.
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
# The names of attention layers before diffusers 0.16, which the published files have.
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_CONFIG = 2**20  # bytes


def load(path_or_name: str | Path, *, dtype: DTypeLike = jnp.float32) -> Autoencoder:
    """Reads an autoencoder in diffusers' format, such as `stabilityai/sd-vae-ft-ema` or `-mse`.

    Args:
        path_or_name: a folder with config.json and diffusion_pytorch_model.safetensors; a safetensors file
            with its config.json beside it; or, where there is no such path, "owner/name" on the Hugging Face
            Hub.
        dtype: of activations and products; parameters are float32.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is not exactly what its config describes.
    """
    config_path, weights_path = _find(path_or_name)
    config = _read_config(config_path)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    arrays = _read_weights(weights_path, {path: variable.shape for path, variable in flat})
    loaded = [(path, variable.replace(arrays[path])) for path, variable in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _find(path_or_name: str | Path) -> tuple[Path, Path]:
    """Where the config and the weights are."""
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path / CONFIG_FILE, path / WEIGHTS_FILE
    if path.exists():
        return path.with_name(CONFIG_FILE), path
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path_or_name)):
        raise CheckpointError(
            f"autoencoder {path}: there is no such folder or file, nor can it be a Hub's name"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"autoencoder {path_or_name}: there is no such path, and for the Hugging Face Hub,"
            " `pip install huggingface_hub` is missing"
        ) from error
    try:
        config, weights = (Path(hf_hub_download(str(path_or_name), f)) for f in (CONFIG_FILE, WEIGHTS_FILE))
    # Its errors are of many kinds: the network's, the Hub's, the cache's.
    except Exception as error:
        raise CheckpointError(
            f"autoencoder {path_or_name}: there is no such path, and the Hugging Face Hub did not give it"
            f" ({_first_line(error)}); where there is no network, give a folder with {CONFIG_FILE} and"
            f" {WEIGHTS_FILE}"
        ) from error
    return config, weights


def _read_config(path: Path) -> AutoencoderArchitecture:
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(_MAX_CONFIG))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: there is no such file; the weights' sizes and scale stand in it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_first_line(error)})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name}={reprlib.repr(fields[name])} is another kind of network; {value!r} is ours"
            )
    for name, value in _BLOCK_TYPES.items():
        types = fields.get(name, [value])
        if not isinstance(types, list) or any(kind != value for kind in types):
            raise CheckpointError(
                f"{path}: {name}={reprlib.repr(types)} is another kind of network; {value!r} are ours"
            )
    sizes = {}
    for field in dataclasses.fields(AutoencoderArchitecture):
        if field.name in fields:
            value = fields[field.name]
            sizes[field.name] = tuple(value) if isinstance(value, list) else value
            if not _same_kind(sizes[field.name], field.default):
                raise CheckpointError(
                    f"{path}: {field.name}={reprlib.repr(value)} is nothing like {field.default!r}"
                )
    try:
        return AutoencoderArchitecture(**sizes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _same_kind(value: object, default: object) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_same_kind(item, default[0]) for item in value)
    return type(value) in ((int, float) if isinstance(default, float) else (int,))


def _read_weights(path: Path, shapes: Mapping[tuple, tuple[int, ...]]) -> dict[tuple, Array]:
    """Our arrays by their paths, float32; all names, shapes and dtypes are compared before one is read."""
    with open_safetensors(path) as file:
        try:
            names = _match(file.arrays, shapes)
            return {
                ours: _converted(name, file.arrays[name].read(), shapes[ours]) for ours, name in names.items()
            }
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _match(stored: Mapping[str, StoredArray], shapes: Mapping[tuple, tuple[int, ...]]) -> dict[tuple, str]:
    """The name in the file of each of our arrays."""
    names, missing, wrong = {}, [], []
    for path, shape in shapes.items():
        name = next((name for name in _torch_names(path) if name in stored), None)
        if name is None:
            missing.append(_torch_names(path)[0])
            continue
        names[path] = name
        array, expected = stored[name], _torch_shapes(shape)
        if array.shape not in expected:
            wrong.append(f"{name} has shape {list(array.shape)} and not {list(expected[0])}")
        elif array.dtype not in _DTYPES:
            wrong.append(f"{name} is {array.dtype} and none of {', '.join(_DTYPES)}")
    unexpected = sorted(set(stored) - set(names.values()))
    problems = {"missing": missing, "unexpected": unexpected, "wrong": wrong}
    if any(problems.values()):
        told = [f"{kind}: {_few(items)}" for kind, items in problems.items() if items]
        raise ValueError(f"does not fit its {CONFIG_FILE}; {'; '.join(told)}")
    return names


def _torch_names(path: tuple) -> list[str]:
    """The names that an array of ours may have in a file."""
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
    """The shapes that an array of ours may have in a file: linear maps may stand as 1×1 convolutions."""
    if len(shape) == 4:
        return [(shape[3], shape[2], *shape[:2])]
    return [shape[::-1], (*shape[::-1], 1, 1)] if len(shape) == 2 else [shape]


def _converted(name: str, array: np.ndarray, shape: tuple[int, ...]) -> Array:
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    if len(shape) == 4:
        return jnp.asarray(array.transpose(2, 3, 1, 0))
    return jnp.asarray(array.reshape(shape[::-1]).T)


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(item[:150] for item in items[:4]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:600]
