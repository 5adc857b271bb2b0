"""Read trained parameters from a workdir, a checkpoint in it, or an exported file.

Readers take the newest intact checkpoint, fall back to older ones and change nothing on disk.
"""

import contextlib
import functools
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dig_jax import config
from dig_jax.checkpoints.integrity import find_corruption, has_record
from dig_jax.checkpoints.parameter_file import CONVERT_HINT, HUB_FILE, read_parameter_file
from dig_jax.checkpoints.power_function import Profile, combination
from dig_jax.checkpoints.s3 import prepare_orbax
from dig_jax.components import Components, Params, network_params, without_unused_options
from dig_jax.config import Config
from dig_jax.config.averages import average_of_length, length_of
from dig_jax.data import ImageSpec
from dig_jax.errors import CheckpointError, ConfigError, naming_setting, one_line
from dig_jax.files import hub
from dig_jax.files.paths import Path, absolute, children, is_remote, to_path
from dig_jax.files.weights import has_weights
from dig_jax.parallel import is_peer_failure, on_process_0, processes_without

log = logging.getLogger(__name__)

# Orbax writes this file last, where a directory cannot be renamed atomically.
MARKER = "commit_success.txt"


def model_path(text: str | os.PathLike) -> Path:
    """Return the path of a trained model that a person named, after downloading it from hf://OWNER/NAME.

    Raises:
        ConfigError: an unsupported or invalid path, or a failed download.
    """
    if not os.fspath(text).startswith(hub.PREFIX):
        return to_path(text)
    with naming_setting(os.fspath(text)):
        return hub.download(hub.repository_of(os.fspath(text)), HUB_FILE)


def read_model(path: Path, ema: str | None = None) -> tuple[Components, int, Params]:
    """Read the components, step and parameters of a trained model. All processes must call this.

    Args:
        path: a workdir, a checkpoint directory in it, or a file or folder that --mode=export wrote.
        ema: the name of an average, such as "0.9999", or "params" for the parameters themselves. The default
            (None or "") is the average that the config samples from; an exported file holds only one. If the
            run keeps power-function averages, "length-0.12" or another length combines those of all its
            checkpoints.

    Returns:
        The components, the step, and the parameters on one local device. The components include the shape and
        classes of the images, so the data need not exist, unless an older version wrote the checkpoint.

    Raises:
        CheckpointError: no file or checkpoint, no such average, or a corrupt or incompatible file.
    """
    if not path.is_dir() and (path.exists() or path.suffix == ".safetensors"):
        return read_parameter_file(path, ema)
    if not has_checkpoints(path):
        if (path / HUB_FILE).exists():
            return read_parameter_file(path / HUB_FILE, ema)
        if has_weights(path):
            raise CheckpointError(f"{path}: a folder of diffusers; {CONVERT_HINT}")
    return read_checkpoint(path, ema)


def holds(path: Path, components: Components, step: int, params: Params) -> bool:
    """Return whether an exported file or a workdir has these parameters, this config and this step."""
    try:
        found, found_step, found_params = read_model(path)
    except CheckpointError:
        return False
    about = (found.config, found.image_spec, found_step, jax.tree.structure(found_params))
    if about != (components.config, components.image_spec, step, jax.tree.structure(params)):
        return False
    return all(map(np.array_equal, jax.tree.leaves(found_params), jax.tree.leaves(params)))


def read_checkpoint(path: Path, ema: str | None = None) -> tuple[Components, int, Params]:
    """Read the newest intact checkpoint of a workdir, or one checkpoint directory, as `read_model` does."""
    directory, _ = newest_intact(path)
    settings, image_spec = _read_config(directory), _read_image_spec(directory)
    name = ema or settings.sampled_ema
    if expected := settings.expected_average(name):
        raise CheckpointError(f"unknown average {name!r} in {directory}; expected {expected}")
    kept = name in (*settings.training.average_names, "params")
    length = None if kept else length_of(name)
    if length is None:
        params = _read_average(directory, name)
    else:
        params = _combined(directory, settings.training.ema_lengths, length)
    step = int(_read_part(directory, "step"))
    return Components(settings, image_spec), step, params


def _read_average(directory: Path, name: str) -> Params:
    """Read the average of this name, or the parameters, on one local device."""
    params = _read_part(directory, *(("params",) if name == "params" else ("ema", name)))
    return network_params(_with_integer_keys(params))


def _read_part(directory: Path, *keys: str) -> Any:
    """Read one subtree of a checkpoint's state, on one local device."""
    target = functools.reduce(operator.getitem, keys, state_metadata(directory))
    for key in reversed(keys):
        target = {key: target}
    return functools.reduce(operator.getitem, keys, _read_like(directory, target))


def _read_like(directory: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Read the leaves that a part of the state's metadata names, on one local device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), target
    )
    return restore_items(
        directory,
        state=ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        ),
    ).state


def _combined(directory: Path, kept: Sequence[float], length: float) -> Params:
    """Return an average of a length that the run did not keep.

    It combines the averages of the kept lengths in this checkpoint and in all older intact ones.
    """
    updates, stored = _updates(directory), {}
    if not updates:
        raise CheckpointError(f"{directory} is before the first update, so it has no averages")
    for candidate in (directory, *_older_intact(directory)):
        if after := _updates(candidate):
            stored |= {(candidate, each): Profile(after, each) for each in kept}
    weights, error = combination(list(stored.values()), Profile(updates, length))
    total = None
    for weight, (candidate, each) in zip(weights, stored, strict=True):
        average = _read_average(candidate, average_of_length(each))
        part = jax.tree.map(lambda x, weight=weight: weight * np.asarray(x, np.float64), average)
        total = part if total is None else jax.tree.map(np.add, total, part)
    log.info(
        "%s combines %d averages of %d checkpoints; the error of its profile is %.2g %%",
        average_of_length(length),
        len(stored),
        len(stored) // len(kept),
        100 * error,
    )
    device = jax.local_devices()[0]
    return jax.tree.map(lambda x: jax.device_put(x.astype(np.float32), device), total)


def _updates(directory: Path) -> int:
    """Return the number of updates of a checkpoint's parameters."""
    metadata = state_metadata(directory)
    counts = _read_like(directory, {name: metadata[name] for name in ("step", "skipped_steps")})
    return int(counts["step"]) - int(counts["skipped_steps"])


def _older_intact(directory: Path) -> list[Path]:
    """Return the older intact checkpoints of a checkpoint's workdir."""
    older = []
    for candidate in _candidates(directory.parent.parent):
        if int(candidate.name) < int(directory.name):
            with contextlib.suppress(CheckpointError):  # a corrupt one
                older.append(newest_intact(candidate)[0])
    return older


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
        return without_unused_options(config.from_dict(_read_json(directory / "config")["config"]))
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
