"""WORKDIR/starts.jsonl: when, where and by what command a run was started and gone on with."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import jax

from dig_jax.files.jsonl import append_row

_VERSIONED = ("dig-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def note_start(workdir: Path, step: int) -> None:
    """Appends a line for this process, which goes on from `step`."""
    device = jax.devices()[0]
    start = {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "devices": f"{jax.device_count()} × {device.device_kind}",
        "processes": jax.process_count(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _VERSIONED},
    }
    append_row(workdir / "starts.jsonl", start)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this program's repository, with "-dirty" where files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None
