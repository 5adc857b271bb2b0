"""Weights & Biases, beside metrics.jsonl, for those who have its package."""

import importlib.util
import uuid
from pathlib import Path
from typing import Any

from dig_jax.errors import ConfigError, UserError


def require_wandb(project: str | None) -> None:
    """Raises unless the package is there, or no project is named.

    Raises:
        ConfigError: says what to install.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.logging.wandb={project!r}: the package wandb is not installed: pip install wandb"
        )


class WandbRun:
    """A run of this project for a workdir; every start of the workdir goes on with the same one.

    Records carry their step as a value, the axis of all curves: the service's own step only ever grows, and
    would drop those that a resumed run writes again.
    """

    def __init__(self, workdir: Path, *, project: str, settings: dict[str, Any]):
        import wandb

        self._wandb = wandb
        path = workdir / "wandb_id.txt"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=path.read_text().strip(),
                dir=workdir,
                resume="allow",
                config=settings,
            )
        except Exception as error:  # of its services and settings nothing is promised
            raise UserError(
                f"config.logging.wandb={project!r}: {str(error).rstrip('.')}; with WANDB_MODE=offline it only"
                " writes files"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, record: dict[str, float]) -> None:
        """Sends the numbers of a step, in the background."""
        self._run.log({"step": step, **record})

    def picture(self, step: int, path: Path) -> None:
        """Sends a grid of samples."""
        self._run.log({"step": step, "samples": self._wandb.Image(str(path))})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()
