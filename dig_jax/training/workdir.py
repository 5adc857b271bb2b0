"""A workdir belongs to the settings that it began with."""

import functools
from pathlib import Path

from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.reader import has_checkpoints, read_config
from dig_jax.config import Config
from dig_jax.errors import UserError
from dig_jax.files.atomic import write_json
from dig_jax.parallel import check_shared_directory, on_process_0


def claim_workdir(settings: Config, workdir: Path) -> None:
    """Makes the workdir and writes config.json into it, unless it began with other settings.

    Raises:
        UserError: it did, and there are checkpoints; or the settings that it began with cannot be read; or it
            cannot be written to.
    """
    # The first process's part, whose errors are those of all.
    on_process_0(functools.partial(_claim, settings, workdir))
    check_shared_directory(workdir)


def _claim(settings: Config, workdir: Path) -> None:
    if has_checkpoints(workdir):
        config.check_same(_began_with(workdir), settings, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config_and_versions(settings))
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written to: {error.strerror}") from error


def _began_with(workdir: Path) -> Config:
    path = workdir / "config.json"
    return config.read_settings(path) if path.exists() else read_config(workdir)
