"""What stands in metrics.jsonl, as series of numbers."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The JSON objects in a file of lines, by rising step.

    Lines that a killed run left incomplete are passed over; of a step that was logged twice the later line
    counts.

    Raises:
        OSError: the file cannot be read.
    """
    by_step: dict[float, dict[str, Any]] = {}
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int | float):
                by_step.setdefault(record["step"], {}).update(record)
    return [by_step[step] for step in sorted(by_step)]


def series(
    records: list[dict[str, Any]], name: str, *, positive: bool = False
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Steps and values where this quantity was logged and is finite, or on a logarithmic axis: positive."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    drawable = np.isfinite(values) & ((values > 0) | (not positive))
    return steps[drawable], values[drawable]


def smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Centred mean over a twenty-fifth of the curve, over what there is of it at the ends."""
    window = np.ones(2 * (len(values) // 50) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
