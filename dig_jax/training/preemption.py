"""Preemption: SIGTERM, which schedulers and clouds send before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Record the first SIGTERM instead of exiting. A second SIGTERM ends the process at once.

    Yields:
        A function of the step number: whether this step is the last one before the process must exit. All
        processes must call it at every step, and get the same answer.
    """
    if jax.process_count() > 1:
        # JAX's preemption service distributes a SIGTERM that any process received.
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()

    def record(number: int, _: object) -> None:
        received.set()
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield lambda step: False
        return
    previous = signal.signal(signal.SIGTERM, record)
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
