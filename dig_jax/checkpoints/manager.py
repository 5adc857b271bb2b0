"""Save and restore WORKDIR/checkpoints/STEP with Orbax. The items are `state`, `data` and `config`.

Each checkpoint also holds a record of its files. It is written before Orbax renames the temporary directory
to STEP, so a directory named STEP was complete when it got this name.

All processes share the workdir. Each process writes its shards of the state. Process 0 does everything else:
it writes the record and chooses the checkpoint to restore.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.integrity import has_record, write_record
from dig_jax.checkpoints.reader import (
    MARKER,
    has_checkpoints,
    newest_intact,
    read_description,
    restore_items,
    state_metadata,
)
from dig_jax.checkpoints.s3 import prepare_orbax
from dig_jax.config import Config
from dig_jax.errors import CheckpointError, one_line
from dig_jax.files.paths import Path, absolute, children, is_remote, rename
from dig_jax.parallel import is_peer_failure, on_process_0


class Checkpoints:
    """The checkpoints of a workdir. Saves run in the background and are atomic.

    Corrupt checkpoints are never deleted: the first save after training resumed from an older one renames
    them to STEP.unreadable. A STEP that is a symbolic link is never deleted either.
    """

    def __init__(self, workdir: Path, settings: config.CheckpointConfig):
        self._directory = absolute(workdir) / "checkpoints"
        self._settings = settings
        self._corrupt: list[Path] = []
        self._manager: ocp.CheckpointManager | None = None
        self._saving = 0
        self._has_saved = False

    def save(
        self,
        step: int,
        state: Any,
        data: dict[str, Any],
        settings: Config,
        metric: float | None = None,
    ) -> None:
        """Save a checkpoint: copy the state to the host and write it in the background.

        Args:
            step: the checkpoint's name.
            state: the train state.
            data: JSON values that describe the position in the training data.
            settings: the run's config.
            metric: the value of `settings.keep_best_by`, negative if higher is better: checkpoints
                with the lowest values are kept.

        Raises:
            CheckpointError: this save or the previous one failed; older checkpoints are unchanged.
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
                    config=ocp.args.JsonSave(config_and_versions(settings)),
                ),
                metrics=None if metric is None else {self._settings.keep_best_by: metric},
                force=True,
            )

    def restore(
        self,
        abstract_state: Any,
        check: Callable[[dict[str, Any], Config], None] = lambda data, settings: None,
    ) -> tuple[Any, dict[str, Any]] | None:
        """Restore the newest intact checkpoint with the shapes and shardings of `abstract_state`.

        Args:
            abstract_state: shapes, dtypes and shardings.
            check: called with the data item and the config before the state is restored; it may raise.

        Returns:
            The state and the data item; None if there is no checkpoint.

        Raises:
            CheckpointError: all checkpoints are corrupt, or the newest intact one does not fit.
        """
        workdir = self._directory.parent
        if not on_process_0(lambda: has_checkpoints(workdir)):
            return None
        directory, self._corrupt = newest_intact(workdir)
        check(*read_description(directory))
        if missing := abstract_state.keys() - state_metadata(directory).keys():
            raise CheckpointError(
                f"{directory} has no {', '.join(sorted(missing))}, so training cannot resume from it; start a"
                f" new --workdir with --config.init_from={workdir}"
            )
        items = {"state": ocp.args.StandardRestore(abstract_state), "data": ocp.args.JsonRestore()}
        restored = restore_items(directory, **items)
        return restored.state, restored.data

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            CheckpointError: the last save failed.
        """
        if self._manager:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save and stop the background threads."""
        if self._manager:
            with self._writing():
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # If another process failed, waiting for the save would take forever.
        if not is_peer_failure(error):
            self.close()

    def _open(self) -> ocp.CheckpointManager:
        """Open the manager for the first save. This removes the temporary files of killed saves."""
        for directory in self._corrupt if jax.process_index() == 0 else []:
            rename(directory, _free_name(directory.with_suffix(".unreadable")))
        if is_remote(self._directory) and jax.process_index() == 0:
            _mark_copies(self._directory)
        kept = [
            policies.LatestN(self._settings.keep),
            policies.BestN(
                get_metric_fn=self._metric,
                reverse=True,
                n=self._settings.keep_best,
                keep_checkpoints_without_metrics=False,
            ),
            _KeepLinks(self._directory),
        ]
        if self._settings.keep_every_steps is not None:
            kept.append(policies.EveryNSteps(self._settings.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=self._metric,  # Orbax stores metrics only if this is set
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                # Orbax calls this before it gives the directory its final name.
                post_finalization_callback=self._complete,
                # If the directory cannot be created, asynchronous creation blocks for five minutes.
                create_directories_asynchronously=False,
            ),
        )
        prepare_orbax(self._directory)
        return ocp.CheckpointManager(self._directory, options=options)

    def _metric(self, metrics: dict[str, float]) -> float:
        """Return a checkpoint's metric; infinity if it is not finite or the checkpoint has another one."""
        value = metrics.get(self._settings.keep_best_by, math.inf)
        return value if math.isfinite(value) else math.inf

    def _complete(self) -> None:
        """Verify the first save, and write the record of the files."""
        if is_remote(self._directory):  # Orbax writes a marker instead of renaming the directory
            directory = self._directory / str(self._saving)
        else:
            directory = next(self._directory.glob(f"{self._saving}.*tmp*"))
        if not self._has_saved:
            state_metadata(directory)  # opens every array: Orbax only logs that it could not join its files
            self._has_saved = True
        write_record(directory, checksums=self._settings.checksums)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn any exception of a failed save into a one-line CheckpointError."""
        try:
            yield
        except Exception as error:
            if is_peer_failure(error):
                raise
            raise CheckpointError(
                f"checkpoint {self._saving} could not be written to {self._directory}: {one_line(error)};"
                " older checkpoints are unchanged"
            ) from error


def _mark_copies(directory: Path) -> None:
    """Add the marker to checkpoints that were copied from a disk: Orbax would delete them as unfinished."""
    for checkpoint in children(directory):
        if has_record(checkpoint) and not (checkpoint / MARKER).exists():
            (checkpoint / MARKER).write_text("copied from a disk")


class _KeepLinks(policies.PreservationPolicy):
    """Preserve checkpoints that are symbolic links: they were archived, and Orbax cannot delete links."""

    def __init__(self, directory: Path):
        self._directory = directory

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint whether it is a link."""
        if is_remote(self._directory):
            return [False] * len(checkpoints)
        return [os.path.islink(self._directory / str(checkpoint.step)) for checkpoint in checkpoints]


def _free_name(path: Path) -> Path:
    others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], others) if not name.exists())
