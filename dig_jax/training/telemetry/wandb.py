"""Weights & Biases, an optional second destination for metrics."""

import importlib
import importlib.util
import uuid
from pathlib import Path
from typing import Any

from dig_jax.errors import ConfigError, UserError, install_command, one_line


def require_wandb(project: str | None) -> None:
    """Check that wandb is installed if a project is set.

    Raises:
        ConfigError: it is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.logging.wandb={project!r} needs the package wandb: {install_command('wandb')}"
        )


class WandbRun:
    """A wandb run for a workdir. Every start with the same workdir continues the same run.

    Rows carry their step as a value, which is the x-axis of all charts. wandb's step counter only
    increases and would drop the rows that a resumed run writes again.
    """

    def __init__(self, workdir: Path, *, project: str, settings: dict[str, Any]):
        self._wandb: Any = importlib.import_module("wandb")
        path = workdir / "wandb_id.txt"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        try:
            self._run = self._wandb.init(
                project=project,
                name=workdir.name,
                id=path.read_text().strip(),
                dir=workdir,
                resume="allow",
                config=settings,
            )
        except Exception as error:  # wandb does not document what it raises
            raise UserError(
                f"config.logging.wandb={project!r}: {one_line(error).rstrip('.')}; set WANDB_MODE=offline to"
                " write local files only"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, row: dict[str, float]) -> None:
        """Send the metrics of a step in the background."""
        self._run.log({"step": step, **row})

    def write_image(self, step: int, path: Path) -> None:
        """Send a grid of samples."""
        self._run.log({"step": step, "samples": self._wandb.Image(str(path))})

    def close(self) -> None:
        """Send buffered data."""
        self._run.finish()
