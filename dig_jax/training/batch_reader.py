"""Waiting for batches, which may take forever: a file server that does not answer blocks a read."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from dig_jax.progress import duration

log = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]

# Seconds between calls of `should_stop`, and before the first line about a read. The interval then doubles.
_LOOK, _FIRST_LINE = 1.0, 60.0


class BatchReader:
    """Reads batches in a thread of its own, so that signals are handled and a long wait is logged.

    Args:
        data: the batches.
        should_stop: whether the process must exit; asked while a read takes long.
    """

    def __init__(self, data: Iterator[HostBatch], should_stop: Callable[[], bool]):
        self._data, self._should_stop = data, should_stop
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[HostBatch | BaseException] = queue.SimpleQueue()
        # A daemon, because nothing ends a read that hangs.
        threading.Thread(target=self._answer, daemon=True, name="batch reader").start()

    def read(self) -> HostBatch | None:
        """Return the next batch, or None if the process must exit before it arrives.

        Raises:
            BaseException: reading failed.
        """
        self._requests.put(True)
        started, next_line = time.monotonic(), _FIRST_LINE
        while True:
            try:
                answer = self._answers.get(timeout=_LOOK)
            except queue.Empty:
                waited = time.monotonic() - started
                if self._should_stop():
                    return None
                if waited >= next_line:
                    log.warning(
                        "no batch for %s: the storage of the images does not answer", duration(waited)
                    )
                    next_line *= 2
            else:
                if isinstance(answer, BaseException):
                    raise answer
                return answer

    def close(self) -> None:
        """End the thread, unless a read hangs."""
        self._requests.put(False)

    def _answer(self) -> None:
        while self._requests.get():
            try:
                self._answers.put(next(self._data))
            except BaseException as error:  # raised again by `read`
                self._answers.put(error)
