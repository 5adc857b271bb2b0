"""The notice that a run is to end: SIGTERM, which schedulers and clouds send before they take a machine."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def notice_of_end() -> Iterator[Callable[[int], bool]]:
    """While it is open the first SIGTERM is only noted; the next one ends the process at once.

    Yields:
        Whether a step is to be the last one, by its number: to be asked at each step, by all processes, which
        get the same answer.
    """
    if jax.process_count() > 1:
        # JAX's own service hears of the notice that any of the processes got.
        yield multihost_utils.reached_preemption_sync_point
        return
    noted = threading.Event()

    def note(number: int, _: object) -> None:
        noted.set()
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # to which Python leaves signals
        yield lambda step: False
        return
    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: noted.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
