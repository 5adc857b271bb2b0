"""Preemption: SIGTERM, which schedulers and clouds send before they take a machine away, and Ctrl-C."""

import _thread
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


@contextlib.contextmanager
def preemption_notice() -> Iterator[Callable[[int], bool]]:
    """Record the first SIGTERM or Ctrl-C instead of exiting. A second one ends the process at once.

    Yields:
        A function of the step number: whether this step is the last one before the process must exit. All
        processes must call it at every step, and get the same answer.
    """
    received = threading.Event()
    has_peers = jax.process_count() > 1

    def record(number: int, _: object) -> None:
        received.set()
        for each in handled:
            signal.signal(each, signal.SIG_DFL)
        if has_peers:
            os.kill(os.getpid(), signal.SIGTERM)
        # Not in the handler: it may have interrupted a write to the same stream.
        message = "%s: finishing this step and saving; send it again to exit at once"
        _thread.start_new_thread(log.info, (message, signal.Signals(number).name))

    # With several processes JAX's preemption service handles SIGTERM, which it shares with all processes.
    handled = (signal.SIGINT,) if has_peers else (signal.SIGINT, signal.SIGTERM)
    previous = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread can handle signals
        previous = {number: signal.signal(number, record) for number in handled}
    try:
        yield multihost_utils.reached_preemption_sync_point if has_peers else lambda step: received.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
