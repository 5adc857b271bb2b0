"""Which processes run on this machine."""

import os
import socket
from pathlib import Path


def machine() -> str:
    """Return a name of this boot and its process namespace, within which process numbers are unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def is_running(pid: int, started: str | None = None) -> bool:
    """Return whether a process of this machine runs; True on systems that do not tell.

    Args:
        pid: its number.
        started: the value of `start_time` when it ran; numbers are used again. None: any process counts.
    """
    if os.name != "posix":  # there, `os.kill` would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        pass
    fields = _stat(pid)
    if fields is None:
        return True
    # A zombie has ended, but its parent has not asked for its exit status.
    return fields[0] not in "ZX" and started in (None, fields[19])


def start_time(pid: int) -> str | None:
    """Return a process's start in clock ticks since the boot; None if the system does not tell."""
    fields = _stat(pid)
    return fields[19] if fields else None


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on, see proc_pid_stat(5); None without the file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
