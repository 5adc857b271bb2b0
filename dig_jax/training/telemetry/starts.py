"""WORKDIR/starts.jsonl: when, where and by what command a run was started and gone on with."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

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
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start, ensure_ascii=False) + "\n")


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The lines, without what a killed run left of one."""
    path = workdir / "starts.jsonl"
    starts = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            start = json.loads(line)
        except ValueError:
            continue
        if isinstance(start, dict) and isinstance(start.get("step"), int):
            starts.append(start)
    return starts


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
