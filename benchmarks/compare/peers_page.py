"""The rows of peers.json in words and as tables."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Name in a row → heading.
_COLUMNS = {
    "PyTorch": "DiT, PyTorch",
    "diffusers": "DiT, diffusers",
    "DiT": "DiT, ours",
    "fla": "DiG, PyTorch with fla",
    "DiG": "DiG, ours",
}
_PACKAGES = {"torch": "PyTorch", "diffusers": "diffusers", "fla": "fla", "jax": "JAX"}
# Pairs of programs whose speeds are divided, the first by the second.
_RATIOS = (("DiT", "PyTorch"), ("DiT", "diffusers"), ("DiG", "fla"), ("DiG", "DiT"))
Row = Mapping[str, Any]


def name_of(row: Row) -> str:
    """Return the case of a row in words."""
    steps = row["sampling_steps"]
    phase = {
        "forward": "forward",
        "train": "train step",
        "sample": f"{steps} step{'s' if steps > 1 else ''} of Euler's method",
    }
    return f"{phase[row['phase']]}, {row['pixels']:,} px"


def describe(row: Row) -> str:
    """Return the medians of a row in words."""
    times = ", ".join(f"{name} {_number(t)}" for name, t in _times(row).items())
    return f"{times} s ({_clock(row)})"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table of medians and ratios per device and size.

    Args:
        rows: in the order of the tables. Of the rows that differ only in their threads, the last is shown.
    """

    def kind(row: Row) -> tuple[str, str, str]:
        return row["device"], row["size"], row["dtype"]

    for (device, size, dtype), group in itertools.groupby(rows, kind):
        best = {(row["pixels"], row["phase"]): row for row in group}.values()
        yield f"**Size {size}, {device}, {dtype}**\n"
        yield from _table([*best])
        yield f"\n*{_versions(best)}.*\n"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    columns = [name for name in _COLUMNS if any(name in row["median"] for row in rows)]
    ratios = [pair for pair in _RATIOS if {*pair} <= {*columns}]
    heads = ["", "images", "clock", *(f"{_COLUMNS[name]}, s" for name in columns)]
    heads += [f"speed of {_COLUMNS[fast]} / {_COLUMNS[slow]}" for fast, slow in ratios]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        times = _times(row)
        seconds = [_number(times[name]) if name in times else "not run" for name in columns]
        speeds = [
            f"{times[slow] / times[fast]:.2f}" if {fast, slow} <= times.keys() else "–"
            for fast, slow in ratios
        ]
        yield f"| {' | '.join([name_of(row), str(row['images']), _clock(row), *seconds, *speeds])} |"


def _times(row: Row) -> dict[str, float]:
    return {name: median[row["clock"]] for name, median in row["median"].items()}


def _number(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3g}"


def _clock(row: Row) -> str:
    """Return the clock and the threads in words."""
    if row["device"] != "cpu":
        return row["clock"]
    return f"{row['clock']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def _versions(rows: Iterable[Row]) -> str:
    """Return the versions of the packages and the dates of rows."""
    programs = [program for row in rows for program in row["about"].values()]
    found = dict.fromkeys(
        f"{name} {program[package]}"
        for package, name in _PACKAGES.items()
        for program in programs
        if package in program
    )
    dates = sorted({row["date"] for row in rows})
    return f"{', '.join(found)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
