"""WORKDIR/starts.jsonl: the time, machine, command and versions of every start of a run."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
from pathlib import Path

import jax

import dig_jax
from dig_jax.files.jsonl import append_row
from dig_jax.program import restart

_PACKAGES = ("dig-jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def note_start(workdir: Path, step: int) -> None:
    """Append a row for this start, which begins or resumes at `step`."""
    device = jax.devices()[0]
    start = {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(restart()),
        "devices": f"{jax.device_count()} × {device.device_kind}",
        "processes": jax.process_count(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    append_row(workdir / "starts.jsonl", start)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this program's repository, with "-dirty" if files were changed."""
    root = Path(dig_jax.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
