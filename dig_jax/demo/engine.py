"""A queue in front of one thread that draws: concurrent requests share batches.

The thread takes the oldest image that waits and fills the batch with images of the same program, in the order
in which they came. So no request starves, and every batch runs a program that some request needs anyway.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from dig_jax.demo.request import ImageRequest, Program
from dig_jax.errors import one_line

log = logging.getLogger(__name__)

Pixels = UInt8[np.ndarray, "n h w c"]

Watch = Callable[[int, Pixels], None]
"""(evaluations so far, images predicted at the last one): called while a batch is drawn."""


Draw = Callable[[Program, Sequence[int], Sequence[int], Sequence[float], Watch | None], Pixels]
"""(program, labels, seeds, scales of guidance, watch) -> images: at most a batch of them."""


class QueueFull(Exception):
    """More images wait than the queue holds."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        request: the request.
        watched: whether somebody looks at `frames`.
        result: its images [N, H, W, C], or the error of the batch that failed. To cancel it drops the images
            that still wait.
        evaluations: how often the network was evaluated for the batch that is being drawn.
        frames: for each image, the image itself or the last prediction of it; None before its batch began.
    """

    request: ImageRequest
    watched: bool = False
    result: "concurrent.futures.Future[Pixels]" = dataclasses.field(default_factory=concurrent.futures.Future)
    evaluations: int = 0
    frames: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    missing: int = 0

    def __post_init__(self):
        self.missing = len(self.request.seeds)
        self.frames = [None] * self.missing


Item = tuple[Job, int]
"""A job and the index of one of its images."""


class Engine:
    """Draws the images of many requests in batches of a fixed size.

    Attributes:
        drawing: number of images of the current batch.
        drawn: number of images drawn since the start.
        batches: number of batches drawn since the start.
    """

    def __init__(self, draw: Draw, *, batch_size: int, max_waiting: int):
        """Start the thread.

        Args:
            draw: draws a batch; only the engine's thread calls it.
            batch_size: greatest number of images of a call of `draw`.
            max_waiting: greatest number of images in the queue, without those that are being drawn.
        """
        self.drawing = self.drawn = self.batches = 0
        self._draw, self._batch_size, self._max_waiting = draw, batch_size, max_waiting
        self._items: collections.deque[Item] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="demo-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of images in the queue."""
        with self._changed:
            self._drop_cancelled()
            return len(self._items)

    def submit(self, request: ImageRequest, *, watched: bool = False) -> Job:
        """Return a new job for a request.

        Raises:
            QueueFull: the queue has no room for its images.
        """
        job = Job(request, watched)
        with self._changed:
            self._drop_cancelled()
            if self._closed or len(self._items) + job.missing > self._max_waiting:
                raise QueueFull(f"the queue is full: {len(self._items)} images wait; try again later")
            self._items.extend((job, index) for index in range(job.missing))
            self._changed.notify()
        return job

    def close(self) -> None:
        """Cancel what waits, and wait until the current batch is drawn."""
        with self._changed:
            self._closed = True
            for job, _ in self._items:
                job.result.cancel()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._draw_batch(batch)
            except Exception as error:  # the requests fail, but the demo goes on
                log.warning("a batch failed: %s", one_line(error, name_type=True))
                for job, _ in batch:
                    _settle(job, error)

    def _next_batch(self) -> list[Item]:
        """Wait for images, and take those of one program; [] after `close`."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._closed:
                    return []
                if self._items:
                    break
                self.drawing = 0
                self._changed.wait()
            program = self._items[0][0].request.program
            batch: list[Item] = []
            rest: collections.deque[Item] = collections.deque()
            for item in self._items:
                fits = len(batch) < self._batch_size and item[0].request.program == program
                (batch if fits else rest).append(item)
            self._items, self.drawing = rest, len(batch)
            return batch

    def _draw_batch(self, batch: Sequence[Item]) -> None:
        requests = [job.request for job, _ in batch]

        def watch(evaluations: int, images: Pixels) -> None:
            for (job, index), image in zip(batch, images, strict=False):
                job.evaluations, job.frames[index] = evaluations, image

        images = self._draw(
            requests[0].program,
            [request.label for request in requests],
            [request.seeds[index] for request, (_, index) in zip(requests, batch, strict=True)],
            [request.guidance_scale for request in requests],
            watch if any(job.watched for job, _ in batch) else None,
        )
        self.batches, self.drawn = self.batches + 1, self.drawn + len(batch)
        for (job, index), image in zip(batch, images, strict=True):
            job.frames[index] = image
            job.missing -= 1
            if not job.missing:
                _settle(job)

    def _drop_cancelled(self) -> None:
        """Remove the images of jobs that were cancelled or failed; the caller holds the lock."""
        if any(job.result.done() for job, _ in self._items):
            self._items = collections.deque(item for item in self._items if not item[0].result.done())


def _settle(job: Job, error: Exception | None = None) -> None:
    """Set the result of a job, unless it was cancelled."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        if error is None:
            job.result.set_result(np.stack([frame for frame in job.frames if frame is not None]))
        else:
            job.result.set_exception(error)
