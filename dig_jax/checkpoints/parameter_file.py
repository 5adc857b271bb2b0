"""Parameter files: one safetensors file with the parameters, and the config and step in its header.

Arrays are named by their paths in the parameter tree, such as "blocks.groups.0.mixer.q_proj.kernel", and are
float32. The metadata values are strings: `format` ("dig-jax"), `config` and `versions` (JSON, as in
config.json), `images` (JSON: image shape and class names), `step`, and `ema` (the average's decay or
"params").
"""

import contextlib
import json
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.components import Components, Params, without_unused_options
from dig_jax.data import ImageSpec
from dig_jax.errors import CheckpointError, ConfigError, one_line
from dig_jax.files.paths import Path, make_folder
from dig_jax.files.safetensors import StoredArray, open_safetensors, write_safetensors

FORMAT = "dig-jax"
HUB_FILE = "model.safetensors"
"""Name of the parameter file in a folder that --mode=export wrote, and in a repository of the Hub."""
CONVERT_HINT = "convert it with `python -m dig_jax.convert`"


def write_parameter_file(path: Path, components: Components, step: int, params: Params) -> None:
    """Write a parameter file atomically.

    Args:
        path: FILE.safetensors.
        components: the model; its config names the average that `params` holds.
        step: the number of steps the parameters were trained for.
        params: the parameters.

    Raises:
        CheckpointError: the file could not be written.
    """
    arrays = {name: np.asarray(x) for name, x in by_name(params).items()}
    description = config_and_versions(components.config)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(description["config"]),
        "versions": json.dumps(description["versions"]),
        "images": json.dumps(components.image_spec.to_dict()),
        "step": str(step),
        "ema": components.config.sampled_ema,
    }
    with writing_to(path):
        write_safetensors(path, arrays, metadata)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Create the parent directory, and turn an OSError of the block into a CheckpointError.

    Raises:
        CheckpointError: `path` could not be written.
    """
    try:
        make_folder(path.parent)
        yield
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or one_line(error)}") from error


def read_parameter_file(path: Path, ema: str | None = None) -> tuple[Components, int, Params]:
    """Read a parameter file: components, step, and the parameters on one local device.

    Args:
        path: FILE.safetensors.
        ema: the expected average; None or "" accepts the one in the file.

    Raises:
        CheckpointError: the file is missing, corrupt, written by another program or a different version, or
            the arrays do not match the config.
    """
    with open_safetensors(path) as file:
        components, step, stored_ema = _read_metadata(file.metadata, path)
        if ema and ema != stored_ema:
            raise CheckpointError(f"unknown average {ema!r} in {path}; expected {stored_ema}")
        expected = jax.eval_shape(components.init_params, jax.random.key(0))
        _check_arrays(file.arrays, expected, path)
        names, device = by_name(expected), jax.local_devices()[0]
        arrays = [jax.device_put(_read_finite(file.arrays, name, path), device) for name in names]
    return components, step, jax.tree.unflatten(jax.tree.structure(expected), arrays)


def _read_metadata(metadata: Mapping[str, str], path: Path) -> tuple[Components, int, str]:
    """Return the components, the step and the name of the average."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by --mode=export: got format={metadata.get('format')!r} in its header;"
            f" expected {FORMAT!r}; {CONVERT_HINT}"
        )
    try:
        settings = without_unused_options(config.from_dict(json.loads(metadata["config"])))
        images = json.loads(metadata.get("images", "{}"))
        if not isinstance(images, dict):
            raise ValueError(f"invalid images: got {reprlib.repr(images)}; expected an object")
        return Components(settings, ImageSpec.from_dict(images)), int(metadata["step"]), metadata["ema"]
    except ConfigError as error:
        raise CheckpointError(f"{path} was written by a different version: {error}") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header: {one_line(error, name_type=True)}") from error


def _check_arrays(arrays: Mapping[str, StoredArray], expected: Params, path: Path) -> None:
    wanted = {name: f"float32 {list(x.shape)}" for name, x in by_name(expected).items()}
    found = {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
    wrong = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path} has {len(wrong)} arrays that do not match its config; the first is {wrong[0]}: got"
            f" {found.get(wrong[0], 'none')}; expected {wanted.get(wrong[0], 'none')}"
        )


def _read_finite(arrays: Mapping[str, StoredArray], name: str, path: Path) -> np.ndarray:
    array = arrays[name].read()
    if not np.isfinite(array).all():
        raise CheckpointError(f"{path}: {name} has non-finite values")
    return array


def by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves by dotted path, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
