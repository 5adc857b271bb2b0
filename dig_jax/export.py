"""Parameters alone in a file to share: safetensors, with the config and the step in its header.

The arrays bear their paths in the parameters' tree, such as "blocks.groups.0.mixer.q_proj.kernel", and are
float32, bit for bit those of the checkpoint. The metadata, all text, are `format` ("dig-jax"), `config` and
`versions` (JSON, as in config.json), `step`, and `ema`: the average's decay, or "params".
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dig_jax import config
from dig_jax.checkpoint import described, read_params
from dig_jax.config import Config, check_same
from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.experiment import Experiment, Params

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
    check_same(stored, settings, workdir)
    write_model(output, settings, step, params)
    count = len(jax.tree.leaves(params))
    log.info("%d arrays of step %d (%s) are in %s", count, step, settings.sampled_ema, output)


def write_model(output: Path, settings: Config, step: int, params: Params) -> None:
    """Writes a file of parameters, those that `settings.sampled_ema` names, whole or not at all.

    Raises:
        CheckpointError: it could not be written.
    """
    arrays = {name: np.asarray(x) for name, x in _named(params).items()}
    about = described(settings)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(about["config"]),
        "versions": json.dumps(about["versions"]),
        "step": str(step),
        "ema": settings.sampled_ema,
    }
    write_whole(output, lambda path: save_file(arrays, path, metadata))


def write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Has a file written under another name, which then becomes `output`.

    Raises:
        CheckpointError: it could not be written, and is not there.
    """
    temporary = output.with_name(f"{output.name}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # otherwise, of safetensors, the owner's alone
        os.replace(temporary, output)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{output} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_model(path: Path, ema: str | None = None) -> tuple[Config, int, Params]:
    """Config, step and parameters of an exported file, or as `checkpoint.read_params` gives them.

    Args:
        path: FILE.safetensors, a workdir, or a checkpoint directory in it.
        ema: as in `read_params`; a file holds no choice.

    Raises:
        CheckpointError: there is no such file or checkpoint, it is damaged, not one of ours or of another
            version, or holds other parameters than its config describes.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        return read_params(path, ema)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    with _opened(path) as file:
        settings, step, stored_ema = _described_by(file.metadata() or {}, path)
        if ema and ema != stored_ema:
            raise CheckpointError(f"{path} has no average {ema!r}; it has {stored_ema} alone")
        expected = _expected(settings)
        _check_fits(file, expected, path)
        device = jax.local_devices()[0]
        arrays = [jax.device_put(file.get_tensor(name), device) for name in _named(expected)]
    return settings, step, jax.tree.unflatten(jax.tree.structure(expected), arrays)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file; its header is sound: every array has its bytes, and every byte is an array's."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def _described_by(metadata: dict[str, str], path: Path) -> tuple[Config, int, str]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by --mode=export: its header does not say {FORMAT}")
    try:
        settings = config.from_dict(json.loads(metadata["config"]))
        return settings, int(metadata["step"]), metadata["ema"]
    except ConfigError as error:
        raise CheckpointError(f"{path} is of another version: {error}") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header: {type(error).__name__}: {error}") from error


def _expected(settings: Config) -> Any:
    """Shapes and dtypes of the parameters that a config describes."""
    return jax.eval_shape(Experiment(settings).init_params, jax.random.key(0))


def _check_fits(file: Any, expected: Any, path: Path) -> None:
    wanted = {name: ("F32", list(x.shape)) for name, x in _named(expected).items()}
    found = {}
    for name in file.keys():  # noqa: SIM118 (it is no dict)
        part = file.get_slice(name)
        found[name] = (part.get_dtype(), part.get_shape())
    wrong = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} arrays are not those of its config, the first is {wrong[0]}:"
            f" {_told(found, wrong[0])} there, {_told(wanted, wrong[0])} by the config"
        )


def _told(arrays: dict[str, tuple[str, list[int]]], name: str) -> str:
    return "{} {}".format(*arrays[name]) if name in arrays else "none"


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their paths, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
