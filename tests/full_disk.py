"""A disk that is full."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(limit: int):
    """Simulate a full disk: no file can grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
