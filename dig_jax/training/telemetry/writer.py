"""Write metrics and sample grids to metrics.jsonl, TensorBoard and Weights & Biases."""

import logging
import math
from pathlib import Path

import numpy as np
from PIL import Image

from dig_jax.files.jsonl import append_row, truncate_rows
from dig_jax.training.telemetry.step_meter import Row
from dig_jax.training.telemetry.tensorboard import TensorBoard
from dig_jax.training.telemetry.wandb import WandbRun

log = logging.getLogger(__name__)


class MetricWriter:
    """Writer of rows to metrics.jsonl and, if enabled, to TensorBoard and wandb.

    A resumed run first drops the rows of steps after the restored one, because it will write them again.

    Args:
        directory: the workdir on process 0; a temporary directory on other processes.
        first_step: the restored step, or 0.
        tensorboard: whether to write TensorBoard files.
        wandb: a wandb run, which this writer closes.
    """

    def __init__(self, directory: Path, *, first_step: int, tensorboard: bool, wandb: WandbRun | None = None):
        self._path = directory / "metrics.jsonl"
        if invalid := truncate_rows(self._path, last_step=first_step):
            log.warning("dropped %d invalid lines from %s", invalid, self._path)
        self._wandb = wandb
        self._tensorboard = TensorBoard(directory / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, row: Row) -> None:
        """Write the metrics of a step. JSON has no NaN and infinity, so they become null."""
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        append_row(self._path, {"step": step, **dict.fromkeys(row), **finite})
        if self._tensorboard is not None:
            self._tensorboard.write(step, finite)
        if self._wandb is not None:
            self._wandb.write(step, finite)

    def write_image(self, step: int, path: Path) -> None:
        """Send a grid of samples, if the file exists, to TensorBoard and wandb."""
        if not path.exists():
            return
        if self._tensorboard is not None:
            self._tensorboard.write_image(step, np.asarray(Image.open(path)))
        if self._wandb is not None:
            self._wandb.write_image(step, path)

    def close(self) -> None:
        """Write buffered data."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()
