"""The standard streams of a program: closed ones, and those that cannot show every character."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator


def prepare_streams() -> None:
    """Open closed streams on the null device, and let standard output replace characters that it cannot show.

    Without a descriptor 1 or 2, the next file to be opened would get the number, and what libraries write to
    standard output or standard error would end in that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the program runs)
    with contextlib.suppress(AttributeError):  # a notebook's stream shows everything
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def ending_with_reader() -> Iterator[None]:
    """End the program quietly if nobody reads its standard output any more, as in `main.py --help | head -1`.

    The exit status is 141 = 128 + SIGPIPE, which shells expect of such a program.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if _has_reader(sys.stdout.fileno()):  # another pipe, or a connection
            raise
        # Python flushes the stream again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _has_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))
