"""A workdir belongs to the config that it was created with."""

import contextlib
import functools
from collections.abc import Iterator

from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.reader import has_checkpoints, read_config
from dig_jax.components import without_unused_options
from dig_jax.config import Config
from dig_jax.errors import naming_directory
from dig_jax.files.atomic import remove_leftovers, write_json
from dig_jax.files.lock import LOCK_FILE
from dig_jax.files.paths import Path, check_plain
from dig_jax.parallel import check_shared_directory, on_process_0, one_writer


@contextlib.contextmanager
def claim_workdir(settings: Config, workdir: Path) -> Iterator[None]:
    """Create the workdir if needed, write config.json into it, and be its only writer within the context.

    All processes must call this. Temporary files of killed runs are deleted.

    Raises:
        UserError: the workdir is in use, has checkpoints of a different or unreadable config, is not
            writable, or is not shared by all processes.
    """
    check_plain(workdir, "--workdir")
    with one_writer(workdir / LOCK_FILE, workdir):
        on_process_0(functools.partial(_claim, settings, workdir))
        check_shared_directory(workdir)
        yield


def _claim(settings: Config, workdir: Path) -> None:
    if has_checkpoints(workdir):
        config.check_same(_stored_config(workdir), settings, workdir)
    for directory in (workdir, workdir / "samples"):
        remove_leftovers(directory)
    with naming_directory(workdir):
        write_json(workdir / "config.json", config_and_versions(settings))


def _stored_config(workdir: Path) -> Config:
    path = workdir / "config.json"
    return without_unused_options(config.read_settings(path)) if path.exists() else read_config(workdir)
