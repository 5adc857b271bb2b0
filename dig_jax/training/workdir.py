"""A workdir belongs to the config that it was created with."""

import functools

from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.reader import has_checkpoints, read_config
from dig_jax.config import Config
from dig_jax.errors import UserError, one_line
from dig_jax.files.atomic import write_json
from dig_jax.files.paths import Path, check_plain, make_folder
from dig_jax.parallel import check_shared_directory, on_process_0


def claim_workdir(settings: Config, workdir: Path) -> None:
    """Create the workdir if needed and write config.json into it. All processes must call this.

    Raises:
        UserError: the workdir has checkpoints of a different or unreadable config, is not writable, or is not
            shared by all processes.
    """
    check_plain(workdir, "--workdir")
    on_process_0(functools.partial(_claim, settings, workdir))
    check_shared_directory(workdir)


def _claim(settings: Config, workdir: Path) -> None:
    if has_checkpoints(workdir):
        config.check_same(_stored_config(workdir), settings, workdir)
    try:
        make_folder(workdir)
        write_json(workdir / "config.json", config_and_versions(settings))
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"cannot write to the workdir {workdir}: {reason}") from error


def _stored_config(workdir: Path) -> Config:
    path = workdir / "config.json"
    return config.read_settings(path) if path.exists() else read_config(workdir)
