"""Time this package against DiT in PyTorch on one machine, in turns: forward, train step and sampling.

    python benchmarks/compare/peers.py --python=/path/to/python/with/pytorch --cases=256,512

Each program is a process of its own; they run one after the other within each round, so that other work on
the machine slows all of them. Rows, one per size and phase, are stored in peers.json as soon as they are
there. A row that is there is not measured again.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
RECORD = HERE / "peers.json"
PHASES = ("forward", "train", "sample")
# Pixels of an image → images of a batch and sampling steps. Latents have an eighth of the pixels per side.
CASES = {256: (2, 20), 512: (1, 20), 1024: (1, 1)}
SIZES = {"depth": 12, "width": 384, "heads": 6}  # S/2
RIVALS = ("PyTorch", "DiT", "DiG")


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
def workers(python: str, pixels: int, names: list[str], threads: int) -> Iterator[dict[str, Worker]]:
    """Yield the processes of a case by name, and end them."""
    batch, steps = CASES[pixels]
    common = {"side": pixels // 8, "batch": batch, "steps": steps}
    started = {}
    for name in names:
        if name == "PyTorch":
            started[name] = Worker([python, str(HERE / "pytorch_dit.py")], {**SIZES, **common}, threads)
        else:
            command = [sys.executable, str(HERE / "own_model.py")]
            started[name] = Worker(command, {"model": f"{name}-S/2", **common}, threads)
    try:
        yield started
    finally:
        for worker in started.values():
            worker.close()


def measured(running: Mapping[str, Worker], phase: str, repeats: int) -> dict[str, Any]:
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


def table(rows: list[dict[str, Any]]) -> str:
    """Return the medians of CPU time, and the speed of DiT and DiG relative to PyTorch and DiT."""
    lines = [
        "| | images | DiT, PyTorch, s | DiT, ours, s | DiG, ours, s | ours / PyTorch | DiG / DiT, ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu = {name: row["median"][name]["cpu"] for name in row["median"]}
        seconds = [f"{cpu[name]:.2f}" if name in cpu else "not run" for name in RIVALS]
        ratios = [
            f"{cpu[slow] / cpu[fast]:.2f}" if {slow, fast} <= cpu.keys() else "–"
            for slow, fast in (("PyTorch", "DiT"), ("DiT", "DiG"))
        ]
        cells = [f"{row['phase']}, {row['pixels']} px", str(row["images"]), *seconds, *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the missing rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="Python with PyTorch; without it, only our models are timed")
    parser.add_argument("--cases", default="256,512,1024", help="pixels")
    parser.add_argument("--names", default=",".join(RIVALS))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="1 for a machine that is not idle"
    )
    options = parser.parse_args()
    names = [name for name in options.names.split(",") if options.python or name != "PyTorch"]
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else []
    done = {(row["pixels"], row["phase"], row["threads"]) for row in rows}
    for pixels in map(int, options.cases.split(",")):
        missing = [
            phase for phase in options.phases.split(",") if (pixels, phase, options.threads) not in done
        ]
        if not missing:
            continue
        with workers(options.python, pixels, names, options.threads) as running:
            check = {}
            if {"PyTorch", "DiT"} <= running.keys():
                with tempfile.TemporaryDirectory() as folder:
                    running["PyTorch"](f"save={folder}/model.npz")
                    check = running["DiT"](f"check={folder}/model.npz")
            for phase in missing:
                row = {"pixels": pixels, "phase": phase, "images": CASES[pixels][0], **check}
                row["threads"] = options.threads
                row |= measured(running, phase, options.repeats)
                row["about"] = {name: worker.about for name, worker in running.items()}
                row["date"] = datetime.date.today().isoformat()
                rows.append(row)
                RECORD.write_text(json.dumps(rows, indent=1) + "\n")
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
