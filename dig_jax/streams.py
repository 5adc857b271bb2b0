"""The standard streams of a program: closed ones, and those that cannot show every character."""

import contextlib
import os
import sys


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
