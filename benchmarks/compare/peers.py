"""DiT and DiG of size S on the CPU beside DiT in PyTorch: forward, train step and sampling in float32.

Each program is a process of its own; they run one after the other within each round, so that other work on
the machine slows all of them. PyTorch may be installed elsewhere, as its packages need not fit ours. Rows,
one per resolution and phase, are stored in peers.json as soon as they are there.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dig_jax.files.atomic import write_json

HERE = pathlib.Path(__file__).resolve().parent
RECORD = HERE / "peers.json"
PHASES = ("forward", "train", "sample")
# Pixels of an image → images of a batch and sampling steps. Latents have an eighth of the pixels per side.
CASES = {256: (2, 20), 512: (1, 20), 1024: (1, 1)}
SIZES = {"depth": 12, "width": 384, "heads": 6}  # S/2
MODELS = ("DiT", "DiG")
PYTORCH = "PyTorch"
Row = Mapping[str, Any]


def find_python(path: str | None) -> str | None:
    """Return a Python with PyTorch: the given one, or this one, or None.

    Raises:
        SystemExit: the given one has no PyTorch.
    """
    if path is None:
        return sys.executable if importlib.util.find_spec("torch") else None
    with contextlib.suppress(OSError):
        if subprocess.run([path, "-c", "import torch"], capture_output=True, check=False).returncode == 0:
            return path
    raise SystemExit(f"error: invalid --pytorch={path}; expected a Python in which `import torch` works")


class Worker:
    """A worker process that runs commands and returns their times."""

    def __init__(self, command: list[str], options: Mapping[str, Any], threads: int):
        pipe = subprocess.PIPE
        # A thread of OpenMP that waits does not count as work.
        environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"}
        if threads == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        self._process = subprocess.Popen(
            [*command, json.dumps(options)],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=os.environ | environment,
        )
        self.about = self._read()

    def __call__(self, command: str) -> dict[str, Any]:
        """Run a command and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended early: got exit status {self._process.wait()}; expected 0")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def workers(
    python: str | None, pixels: int, models: Sequence[str], threads: int
) -> Iterator[dict[str, Worker]]:
    """Yield the processes of a case by name, and end them."""
    batch, steps = CASES[pixels]
    common = {"side": pixels // 8, "batch": batch, "steps": steps}
    with contextlib.ExitStack() as stack:
        started = {}

        def start(name: str, command: list[str], options: Mapping[str, Any]) -> None:
            started[name] = Worker(command, options, threads)
            stack.callback(started[name].close)

        if python:
            start(PYTORCH, [python, str(HERE / "pytorch_dit.py")], {**SIZES, **common})
        for model in models:
            start(model, [sys.executable, str(HERE / "own_model.py")], {"model": f"{model}-S/2", **common})
        yield started


def measured(running: Mapping[str, Worker], phase: str, repeats: int) -> Row:
    """Return the seconds of each program and round, without a first round that compiles."""
    times: dict[str, list] = {name: [] for name in running}
    for number in range(repeats + 1):
        for name, worker in running.items():
            found = worker(phase)
            if number:
                times[name].append(found)
    kinds = ("cpu", "wall")
    return {
        "seconds": {name: {k: [round(t[k], 4) for t in rows] for k in kinds} for name, rows in times.items()},
        "median": {
            name: {k: statistics.median(t[k] for t in rows) for k in kinds} for name, rows in times.items()
        },
    }


def read(record: pathlib.Path) -> list[Row]:
    """Return the rows of a record."""
    return json.loads(record.read_text()) if record.exists() else []


def add_rows(
    record: pathlib.Path,
    models: Sequence[str],
    pixels: Sequence[int],
    phases: Sequence[str],
    *,
    python: str | None,
    threads: int,
    repeats: int,
    again: bool,
) -> None:
    """Measure, store and print the rows that are missing, or all of them again.

    Args:
        record: the file of the rows.
        models, pixels, phases: the cases.
        python: a Python with PyTorch, or None for our models alone.
        threads: of each program. With one thread the CPU time counts, as other programs may run.
        repeats: rounds after the first one.
        again: replace rows that are there.
    """
    names = {*models} | ({PYTORCH} if python else set())
    done = {
        (row["pixels"], row["phase"], row["threads"]) for row in read(record) if names <= row["median"].keys()
    }
    for number in pixels:
        missing = [phase for phase in phases if again or (number, phase, threads) not in done]
        if not missing:
            continue
        with workers(python, number, models, threads) as running:
            about: dict[str, Any] = {
                "images": CASES[number][0],
                "sampling_steps": CASES[number][1],
                "threads": threads,
            }
            if {PYTORCH, "DiT"} <= running.keys():
                with tempfile.TemporaryDirectory() as folder:
                    running[PYTORCH](f"save={folder}/model.npz")
                    about |= running["DiT"](f"check={folder}/model.npz")
            about["about"] = {name: worker.about for name, worker in running.items()}
            for phase in missing:
                figures = measured(running, phase, repeats)
                date = datetime.date.today().isoformat()
                row = {"pixels": number, "phase": phase, **about, **figures, "date": date}
                kept = [other for other in read(record) if _key(other) != _key(row)]
                write_json(record, sorted([*kept, row], key=_key))
                print(f"{_case(row)}: {describe(row)}", flush=True)


def _key(row: Row) -> tuple[int, int, int]:
    return row["pixels"], PHASES.index(row["phase"]), row["threads"]


def _case(row: Row) -> str:
    """Return the case in words."""
    steps = row["sampling_steps"]
    phase = {
        "forward": "forward",
        "train": "train step",
        "sample": f"{steps} step{'s' if steps > 1 else ''} of Euler's method",
    }
    return f"{phase[row['phase']]}, {row['pixels']:,} px"


def _clock(row: Row) -> str:
    return "cpu" if row["threads"] == 1 else "wall"


def _measure(row: Row) -> str:
    """Return the clock and the threads in words."""
    return f"{_clock(row)}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def describe(row: Row) -> str:
    """Return the medians of a row in words."""
    times = ", ".join(f"{name} {t[_clock(row)]:.2f}" for name, t in row["median"].items())
    return f"{times} s ({_measure(row)})"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table of medians, with the speed of our DiT / PyTorch's and of DiG / our DiT.

    Of a case with different numbers of threads, the row with the most is shown.
    """
    best = {(row["pixels"], row["phase"]): row for row in sorted(rows, key=_key)}
    yield (
        "| | images | clock | DiT, PyTorch, s | DiT, ours, s | DiG, ours, s"
        " | speed of our DiT / PyTorch's | speed of DiG / DiT, ours |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in best.values():
        times = {name: median[_clock(row)] for name, median in row["median"].items()}
        seconds = [f"{times[name]:.2f}" if name in times else "not run" for name in (PYTORCH, *MODELS)]
        ratios = [
            f"{times[slow] / times[fast]:.2f}" if {slow, fast} <= times.keys() else "–"
            for slow, fast in ((PYTORCH, "DiT"), ("DiT", "DiG"))
        ]
        yield "| " + " | ".join([_case(row), str(row["images"]), _measure(row), *seconds, *ratios]) + " |"
    about = [row["about"] for row in best.values()]
    versions = sorted({f"PyTorch {each[PYTORCH]['torch']}" for each in about if PYTORCH in each})
    versions += sorted({f"JAX {each[name]['jax']}" for each in about for name in each if name != PYTORCH})
    dates = sorted({row["date"] for row in best.values()})
    yield f"\n*{', '.join(versions)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.*\n"
