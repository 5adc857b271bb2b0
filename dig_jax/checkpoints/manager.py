"""Checkpoints with Orbax: WORKDIR/checkpoints/STEP, items `state`, `data` and `config`.

A checkpoint also holds the SHA-256 of its files, in the format of `sha256sum --check`: Orbax notices a lost
file, but reads a changed byte as a number. Sums and all are written before Orbax renames the directory to
STEP, so that whatever bears that name was once complete.

Several processes share the workdir. Each writes its parts of the state; everything else is the first one's:
it sums up what all have written, and says which checkpoint is restored.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dig_jax import config
from dig_jax.components import Components, Params
from dig_jax.config import Config
from dig_jax.data import ImageSpec
from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.parallel import is_peer_failure, on_process_0, processes_without

log = logging.getLogger(__name__)

_ITEMS = ("config", "data", "state")
_SUMS = "SHA256SUMS"
_VERSIONED = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


class Checkpoints:
    """The checkpoints of a workdir: saved in the background, found again, never half-written.

    What cannot be read is never deleted: once training goes on from an older one and saves, it is renamed
    to STEP.unreadable.
    """

    def __init__(self, workdir: Path, settings: config.CheckpointConfig):
        self._directory = workdir.absolute() / "checkpoints"
        self._settings = settings
        self._damaged: list[Path] = []
        self._manager: ocp.CheckpointManager | None = None
        self._saving = 0

    def _open(self) -> ocp.CheckpointManager:
        """For the first save; it changes the directory, and removes what killed saves left."""
        for directory in self._damaged if jax.process_index() == 0 else []:
            directory.rename(_free_name(directory.with_suffix(".unreadable")))
        kept = [
            policies.LatestN(self._settings.keep),
            policies.BestN(
                get_metric_fn=_heldout_loss,
                reverse=True,
                n=self._settings.keep_best,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        if self._settings.keep_every_steps:
            kept.append(policies.EveryNSteps(self._settings.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_heldout_loss,  # what is kept is as the policy says; without it no metric is stored
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                # Called when all is written, before the directory gets its name.
                post_finalization_callback=self._write_sums,
                # Otherwise a directory that cannot be made is waited for, five minutes long.
                create_directories_asynchronously=False,
            ),
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def save(
        self,
        step: int,
        state: Any,
        data: dict[str, Any],
        settings: Config,
        heldout_loss: float | None = None,
    ) -> None:
        """Copies the state to the host and writes it in the background.

        A checkpoint with a `heldout_loss`, that of its step, may be kept as one of the best.

        Raises:
            CheckpointError: this save, or the one before, could not be written. Older ones are untouched.
        """
        self.wait()
        self._saving = step
        with self._writing():
            self._manager = self._manager or self._open()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(described(settings)),
                ),
                metrics=None if heldout_loss is None else {"heldout_loss": heldout_loss},
                force=True,
            )

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest intact checkpoint, laid out as `abstract_state` says, and its data item.

        Returns:
            None where there is no checkpoint.

        Raises:
            CheckpointError: there are some and all are damaged, or the newest intact one does not fit.
        """
        if not on_process_0(lambda: has_checkpoints(self._directory.parent)):
            return None
        directory, self._damaged = _agreed_newest_intact(self._directory.parent)
        if lacking := abstract_state.keys() - _stored(directory).keys():
            raise CheckpointError(
                f"{directory} is whole, but has no {', '.join(sorted(lacking))}, and training cannot go on"
                f" without: start another --workdir with --config.init_from={self._directory.parent}"
            )
        items = {"state": ocp.args.StandardRestore(abstract_state), "data": ocp.args.JsonRestore()}
        restored = _read(directory, **items)
        return restored.state, restored.data

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            CheckpointError: the last save could not be written.
        """
        if self._manager:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        if self._manager:
            with self._writing():
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # Where another process is lost a save would wait for it, and never be complete.
        if not is_peer_failure(error):
            self.close()

    def _write_sums(self) -> None:
        directory = next(self._directory.glob(f"{self._saving}.*tmp*"))
        lines = [f"{digest}  {name}\n" for name, digest in _sums(directory).items()]
        (directory / _SUMS).write_text("".join(lines))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns whatever a failed save raises into one line."""
        try:
            yield
        except Exception as error:
            if is_peer_failure(error):
                raise
            raise CheckpointError(
                f"checkpoint {self._saving} could not be written to {self._directory}: {_reason(error)};"
                " older ones are untouched"
            ) from error


def described(settings: Config) -> dict[str, Any]:
    """What a checkpoint and config.json say of a run: its settings, and the versions that it depends on."""
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {"config": dataclasses.asdict(settings), "versions": versions}


def has_checkpoints(workdir: Path) -> bool:
    """Whether there is any, be it damaged."""
    return bool(_candidates(workdir))


def read_config(path: Path) -> Config:
    """The config in the newest intact checkpoint of a workdir, or in one checkpoint directory.

    It needs no other process.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or another version of the program wrote it.
    """
    return _config(_newest_intact(path)[0])


def read_params(path: Path, ema: str | None = None) -> tuple[Components, int, Params]:
    """Components, step and parameters in the newest intact checkpoint of a workdir, or in one of them.

    Of several processes all must call it.

    Args:
        path: a workdir, or a checkpoint directory in it; nothing is changed there.
        ema: the average's decay, such as "0.9999", or "params" for none of them; by default, and where
            empty, as the config says.

    Returns:
        The parameters lie on one local device, whatever mesh they were saved from. The components knows its
        images, without their source, unless an older version wrote the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or there is no such average.
    """
    directory, _ = _agreed_newest_intact(path)
    settings, images = _config(directory), _images(directory)
    name = ema or settings.sampled_ema
    averages = [str(decay) for decay in settings.training.ema_decays]
    if name not in [*averages, "params"]:
        raise CheckpointError(f"{directory} has no average {name!r}; it has {', '.join(averages)} and params")

    metadata = _stored(directory)
    wanted = {"params": metadata["params"]} if name == "params" else {"ema": {name: metadata["ema"][name]}}
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        {"step": metadata["step"], **wanted},
    )
    state = _read(
        directory,
        state=ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        ),
    ).state
    params = state["params"] if name == "params" else state["ema"][name]
    return Components(settings, images), int(state["step"]), _integer_keys(params)


def _agreed_newest_intact(path: Path) -> tuple[Path, list[Path]]:
    """What the first process finds, in all of them; all must call it."""

    def find() -> list[str]:
        chosen, damaged = _newest_intact(path)
        return [str(chosen), *map(str, damaged)]

    directory, *damaged = map(Path, on_process_0(find))
    lacking = processes_without((directory / _SUMS).exists())
    if lacking:
        raise CheckpointError(
            f"process {', '.join(map(str, lacking))} does not see {directory}, which process 0 does:"
            " checkpoints must be on a file system that all hosts share"
        )
    return directory, damaged


def _newest_intact(path: Path) -> tuple[Path, list[Path]]:
    """The newest checkpoint that is as it was written, and the damaged ones that are newer."""
    candidates = _candidates(path)
    for position, directory in enumerate(candidates):
        damage = _damage(directory)
        if damage is None:
            return directory, candidates[:position]
        older = candidates[position + 1 :]
        then = f"falling back to {older[0].name}" if older else "there is no older one"
        log.warning("checkpoint %s is damaged (%s); %s", directory, damage, then)
    if candidates:
        raise CheckpointError(
            f"all checkpoints in {candidates[0].parent} are damaged:"
            f" {', '.join(directory.name for directory in candidates)}"
        )
    raise CheckpointError(f"there is no checkpoint in {path}; train first, or name a workdir that has one")


def _candidates(path: Path) -> list[Path]:
    """The checkpoint directory itself, or those of a workdir, the newest first."""
    path = path.absolute()
    if (path / "state").is_dir():
        return [path]
    steps = [entry for entry in (path / "checkpoints").glob("*") if entry.name.isdigit()]
    return sorted(steps, key=lambda entry: int(entry.name), reverse=True)


def _damage(directory: Path) -> str | None:
    """What is wrong with the files, in a few words."""
    try:
        lines = (directory / _SUMS).read_text().splitlines()
        written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = _sums(directory)
    except (OSError, UnicodeDecodeError) as error:
        return _reason(error)
    changed = [name for name in sorted(written | found) if written.get(name) != found.get(name)]
    return f"changed, lost or added: {changed[0]}" if changed else None


def _sums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of the items, by its path."""
    sums = {}
    for path in sorted(path for item in _ITEMS for path in (directory / item).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _stored(directory: Path) -> dict[str, Any]:
    """Shapes and dtypes of a state."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(directory / "state").tree


def _read(directory: Path, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(directory, ocp.args.Composite(**items))
    except Exception as error:  # of what the libraries raise nothing is promised
        if is_peer_failure(error):
            raise
        raise CheckpointError(f"{directory} is whole, but cannot be used: {_reason(error)}") from error


def _config(directory: Path) -> Config:
    try:
        # Read as it was written, but without the other processes.
        return config.from_dict(ocp.JsonCheckpointHandler().restore(directory / "config")["config"])
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {directory} is of another version: {error}") from error


def _images(directory: Path) -> ImageSpec | None:
    try:
        return ImageSpec.from_dict(ocp.JsonCheckpointHandler().restore(directory / "data"))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {directory}: {error}") from error


def _integer_keys(tree: Any) -> Any:
    """Orbax gives keys as strings; list positions are integers in our dicts."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _integer_keys(value) for key, value in tree.items()}


def _heldout_loss(metrics: dict[str, float]) -> float:
    loss = metrics["heldout_loss"]
    return loss if math.isfinite(loss) else math.inf


def _free_name(path: Path) -> Path:
    others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], others) if not name.exists())


def _reason(error: Exception) -> str:
    """An exception in a few words: the system's own message where there is one."""
    text = str(error).strip()
    system = re.search(r"([^:]+) \[os_error_code=", text)
    if system:
        return system[1].strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
