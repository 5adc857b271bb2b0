"""Read trained parameters from a workdir, a checkpoint in it, or an exported file.

Readers take the newest intact checkpoint, fall back to older ones and change nothing on disk.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dig_jax import config
from dig_jax.checkpoints.integrity import find_corruption, has_record
from dig_jax.checkpoints.parameter_file import CONVERT_HINT, read_parameter_file
from dig_jax.checkpoints.s3 import prepare_orbax
from dig_jax.components import Components, Params
from dig_jax.config import Config
from dig_jax.data import ImageSpec
from dig_jax.errors import CheckpointError, ConfigError, one_line
from dig_jax.files.paths import Path, absolute, children, is_remote, to_path
from dig_jax.files.weights import has_weights
from dig_jax.parallel import is_peer_failure, on_process_0, processes_without

log = logging.getLogger(__name__)

# Orbax writes this file last, where a directory cannot be renamed atomically.
MARKER = "commit_success.txt"


def read_model(path: Path, ema: str | None = None) -> tuple[Components, int, Params]:
    """Read the components, step and parameters of a trained model. All processes must call this.

    Args:
        path: a workdir, a checkpoint directory in it, or a file that --mode=export wrote.
        ema: the decay of an average, such as "0.9999", or "params" for the parameters themselves. The default
            (None or "") is the average that the config samples from; an exported file holds only one.

    Returns:
        The components, the step, and the parameters on one local device. The components include the shape and
        classes of the images, so the data need not exist, unless an older version wrote the checkpoint.

    Raises:
        CheckpointError: no file or checkpoint, no such average, or a corrupt or incompatible file.
    """
    if not path.is_dir() and (path.exists() or path.suffix == ".safetensors"):
        return read_parameter_file(path, ema)
    if not has_checkpoints(path) and has_weights(path):
        raise CheckpointError(f"{path}: a folder of diffusers; {CONVERT_HINT}")
    return read_checkpoint(path, ema)


def read_checkpoint(path: Path, ema: str | None = None) -> tuple[Components, int, Params]:
    """Read the newest intact checkpoint of a workdir, or one checkpoint directory, as `read_model` does."""
    directory, _ = newest_intact(path)
    settings, image_spec = _read_config(directory), _read_image_spec(directory)
    name = ema or settings.sampled_ema
    averages = settings.training.average_names
    if name not in (*averages, "params"):
        raise CheckpointError(
            f"unknown average {name!r} in {directory}; expected {', '.join(averages)} or params"
        )
    metadata = state_metadata(directory)
    wanted = {"params": metadata["params"]} if name == "params" else {"ema": {name: metadata["ema"][name]}}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"step": metadata["step"], **wanted},
    )
    state = restore_items(
        directory,
        state=ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        ),
    ).state
    params = state["params"] if name == "params" else state["ema"][name]
    return Components(settings, image_spec), int(state["step"]), _with_integer_keys(params)


def read_config(path: Path) -> Config:
    """Read the config of a workdir's newest intact checkpoint, or of one checkpoint directory.

    A process may call this alone.

    Raises:
        CheckpointError: no checkpoint, only corrupt ones, or one of a different version.
    """
    return _read_config(_first_intact(path, _candidates(path), find_corruption)[0])


def has_checkpoints(workdir: Path) -> bool:
    """Return whether the workdir has any checkpoint, including corrupt ones.

    Raises:
        CheckpointError: the workdir cannot be read.
    """
    return bool(_candidates(workdir))


def newest_intact(path: Path) -> tuple[Path, list[Path]]:
    """Find the newest intact checkpoint. All processes must call this; each checks a share of the files.

    Returns:
        Its directory, and the corrupt checkpoints that are newer.

    Raises:
        CheckpointError: no checkpoint, only corrupt ones, one that cannot be read, or not all processes can
            see the same ones.
    """
    candidates = [to_path(text) for text in on_process_0(lambda: list(map(str, _candidates(path))))]
    share = {"index": jax.process_index(), "count": jax.process_count()}
    return _first_intact(path, candidates, functools.partial(_find_corruption_together, **share))


def _find_corruption_together(directory: Path, **share: int) -> str | None:
    """Return how a checkpoint is corrupt, the same on all processes, each of which checks its share."""
    sees = on_process_0(lambda: has_record(directory)) <= has_record(directory)
    if blind := processes_without(sees):
        raise CheckpointError(
            f"process {', '.join(map(str, blind))} cannot see {directory}, which process 0 sees; checkpoints"
            " must be on a file system that all hosts share"
        )
    corruption, unreadable = None, None
    try:
        corruption = find_corruption(directory, **share)
    except CheckpointError as error:
        unreadable = error
    if others := processes_without(unreadable is None):
        raise unreadable or CheckpointError(f"process {others[0]} cannot read checkpoint {directory}")
    if others := processes_without(corruption is None):
        return corruption or f"process {others[0]} found a corrupt file"
    return None


def read_description(directory: Path) -> tuple[dict[str, Any], Config]:
    """Return the data item and the config of an intact checkpoint. A process may call this alone.

    Raises:
        CheckpointError: a different version wrote the checkpoint.
    """
    return dict(_read_json(directory / "data")), _read_config(directory)


def state_metadata(directory: Path) -> dict[str, Any]:
    """Return shapes and dtypes of the train state in a checkpoint, as a nested dict.

    Raises:
        CheckpointError: Orbax could not open all arrays.
    """
    prepare_orbax(directory)
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return handler.metadata(epath.Path(directory / "state")).tree
    except Exception as error:  # Orbax and TensorStore do not document what they raise
        raise CheckpointError(f"{directory} could not be opened: {one_line(error)}") from error


def restore_items(directory: Path, **items: ocp.args.CheckpointArgs) -> Any:
    """Restore items of an intact checkpoint, as attributes of the result.

    Raises:
        CheckpointError: Orbax could not restore them.
    """
    prepare_orbax(directory)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(directory, ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore do not document what they raise
        if is_peer_failure(error):
            raise
        raise CheckpointError(
            f"{directory} is intact but could not be restored: {one_line(error)}"
        ) from error


def _first_intact(
    path: Path, candidates: Sequence[Path], find: Callable[[Path], str | None]
) -> tuple[Path, list[Path]]:
    """Return the first of some checkpoints in which `find` finds no corruption, and those before it."""
    for position, directory in enumerate(candidates):
        corruption = find(directory)
        if corruption is None:
            return directory, list(candidates[:position])
        older = candidates[position + 1 :]
        next_try = f"falling back to {older[0].name}" if older else "there is no older checkpoint"
        if jax.process_index() == 0:
            log.warning("checkpoint %s is corrupt (%s); %s", directory, corruption, next_try)
    if candidates:
        names = ", ".join(directory.name for directory in candidates)
        raise CheckpointError(f"all checkpoints in {candidates[0].parent} are corrupt: {names}")
    raise CheckpointError(f"no checkpoint in {path}; expected the workdir of a training run")


def _candidates(path: Path) -> list[Path]:
    """Return the checkpoint directory itself, or a workdir's checkpoint directories, newest first.

    Raises:
        CheckpointError: they cannot be listed, which does not tell whether there are any.
    """
    path = absolute(path)
    try:
        if (path / "state").is_dir():
            return [path]
        steps = [entry for entry in children(path / "checkpoints") if entry.name.isdecimal()]
        if is_remote(path):  # what a killed save left has neither; a copy from a disk has no marker
            steps = [entry for entry in steps if (entry / MARKER).exists() or has_record(entry)]
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoints in {path}: {one_line(error)}") from error
    return sorted(steps, key=lambda entry: int(entry.name), reverse=True)


def _read_config(directory: Path) -> Config:
    try:
        return config.from_dict(_read_json(directory / "config")["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"checkpoint {directory} was written by a different version: {error}"
        ) from error


def _read_image_spec(directory: Path) -> ImageSpec | None:
    try:
        return ImageSpec.from_dict(_read_json(directory / "data"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {directory}: {error}") from error


def _read_json(item: Path) -> Mapping[str, Any]:
    """Read a JSON item without synchronizing processes, unlike `restore_items`."""
    return ocp.JsonCheckpointHandler().restore(epath.Path(item))


def _with_integer_keys(tree: Any) -> Any:
    """Convert digit keys to integers: Orbax returns strings, but our trees index lists by integers."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _with_integer_keys(value) for key, value in tree.items()}
