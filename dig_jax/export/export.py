"""Parameters alone in a file to share: safetensors, with the config and the step in its header.

The arrays bear their paths in the parameters' tree, such as "blocks.groups.0.mixer.q_proj.kernel", and are
float32, bit for bit those of the checkpoint. The metadata, all text, are `format` ("dig-jax"), `config` and
`versions` (JSON, as in config.json), `images` (JSON: their shape, and the names of the classes), `step`, and
`ema`: the average's decay, or "params".
"""

import contextlib
import json
import logging
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dig_jax import config
from dig_jax.checkpoints.manager import described, read_params
from dig_jax.components import Components, Params
from dig_jax.config import Config, check_same
from dig_jax.data import ImageSpec
from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.files.safetensors import StoredArray, open_safetensors, write_safetensors

log = logging.getLogger(__name__)

FORMAT = "dig-jax"


def export(settings: Config, workdir: Path, output: Path) -> None:
    """Writes the parameters that `sampling.ema` names, of a workdir's newest checkpoint, into a file.

    Args:
        settings: its changeable settings, such as `sampling`, go into the file; the rest must be what the
            workdir began with.
        output: FILE.safetensors, which must not be there yet; it is written whole or not at all.

    Raises:
        ConfigError: there is such a file already, its name ends otherwise, or other settings.
        CheckpointError: no checkpoint, or it cannot be read.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output={output} does not end with .safetensors")
    if output.exists():
        raise ConfigError(f"--output={output} is there already; delete it, or take another name")
    stored, step, params = read_params(workdir, settings.sampled_ema)
    check_same(stored.config, settings, workdir)
    write_model(output, stored.with_config(settings), step, params)
    count = len(jax.tree.leaves(params))
    log.info("%d arrays of step %d (%s) are in %s", count, step, settings.sampled_ema, output)


def write_model(output: Path, components: Components, step: int, params: Params) -> None:
    """Writes a file of parameters, those that the config's `sampled_ema` names, whole or not at all.

    Raises:
        CheckpointError: it could not be written.
    """
    arrays = {name: np.asarray(x) for name, x in _named(params).items()}
    about = described(components.config)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(about["config"]),
        "versions": json.dumps(about["versions"]),
        "images": json.dumps(components.image_spec.to_dict()),
        "step": str(step),
        "ema": components.config.sampled_ema,
    }
    with writing_to(output):
        write_safetensors(output, arrays, metadata)


@contextlib.contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Has a file or folder of parameters written in its folder, which is made if need be.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(f"{output} could not be written: {error}") from error


def read_model(path: Path, ema: str | None = None) -> tuple[Components, int, Params]:
    """Components, step and parameters of an exported file, or as `checkpoint.read_params` gives them.

    Args:
        path: FILE.safetensors, a workdir, or a checkpoint directory in it.
        ema: as in `read_params`; a file holds no choice.

    Raises:
        CheckpointError: there is no such file or checkpoint, it is damaged, not one of ours or of another
            version, or holds other parameters than its config describes.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        return read_params(path, ema)
    with open_safetensors(path) as file:
        components, step, stored_ema = _described_by(file.metadata, path)
        if ema and ema != stored_ema:
            raise CheckpointError(f"{path} has no average {ema!r}; it has {stored_ema} alone")
        expected = _expected(components)
        _check_fits(file.arrays, expected, path)
        device = jax.local_devices()[0]
        arrays = [jax.device_put(_finite(file.arrays, name, path), device) for name in _named(expected)]
    return components, step, jax.tree.unflatten(jax.tree.structure(expected), arrays)


def _described_by(metadata: Mapping[str, str], path: Path) -> tuple[Components, int, str]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by --mode=export: its header does not say {FORMAT}")
    try:
        settings = config.from_dict(json.loads(metadata["config"]))
        images = json.loads(metadata.get("images", "{}"))
        if not isinstance(images, dict):
            raise ValueError(f"images={reprlib.repr(images)} is no object")
        return Components(settings, ImageSpec.from_dict(images)), int(metadata["step"]), metadata["ema"]
    except ConfigError as error:
        raise CheckpointError(f"{path} is of another version: {error}") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {type(error).__name__}: {error}") from error


def _expected(components: Components) -> Any:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(components.init_params, jax.random.key(0))


def _check_fits(arrays: Mapping[str, StoredArray], expected: Any, path: Path) -> None:
    wanted = {name: f"float32 {list(x.shape)}" for name, x in _named(expected).items()}
    found = {name: f"{array.dtype} {list(array.shape)}" for name, array in arrays.items()}
    wrong = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} arrays are not those of its config, the first is {wrong[0]}:"
            f" {found.get(wrong[0], 'none')} there, {wanted.get(wrong[0], 'none')} by the config"
        )


def _finite(arrays: Mapping[str, StoredArray], name: str, path: Path) -> np.ndarray:
    array = arrays[name].read()
    if not np.isfinite(array).all():
        raise CheckpointError(f"{path}: {name} holds values that are not finite")
    return array


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
