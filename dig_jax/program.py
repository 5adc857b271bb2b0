"""How this program was started, for lines that tell a user to start it again."""

import sys
from pathlib import Path


def program() -> list[str]:
    """Return the words that start this program: ["python", "main.py"] or ["dig-jax"]."""
    path = sys.argv[0]
    return ["python", path] if path.endswith(".py") else [Path(path).name]


def restart() -> list[str]:
    """Return the words of the command line that started this program."""
    return [*program(), *sys.argv[1:]]
