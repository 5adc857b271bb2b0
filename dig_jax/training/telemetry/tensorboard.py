"""TensorBoard, an optional second destination for metrics."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import image, scalar

from dig_jax.errors import one_line

log = logging.getLogger(__name__)


class TensorBoard:
    """Writer of an event file that flushes each row. A failure is logged once and turns it off.

    tensorboardX's `SummaryWriter` writes in a thread: when its disk is full, the thread dies, its queue fills
    and the training loop waits forever.

    Args:
        directory: where the event files go.
        first_step: the restored step, or 0; TensorBoard hides older values of later steps.
    """

    def __init__(self, directory: Path, first_step: int):
        self._directory = directory
        self._writer: EventsWriter | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        except OSError as error:
            self._turn_off(error)
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, row: dict[str, float]) -> None:
        """Write the metrics of a step."""
        for name, value in row.items():
            self._write(step=step, summary=scalar(name, value))

    def write_image(self, step: int, pixels: UInt8[np.ndarray, "height width c"]) -> None:
        """Write a grid of samples."""
        self._write(step=step, summary=image("samples", pixels, dataformats="HWC"))

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._turn_off(error)

    def _write(self, **fields: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write_event(Event(wall_time=time.time(), **fields))
            self._writer.flush()
        except OSError as error:
            self._turn_off(error)

    def _turn_off(self, error: OSError) -> None:
        self._writer = None
        log.warning("TensorBoard is off: cannot write to %s: %s", self._directory, one_line(error))
