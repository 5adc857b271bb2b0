"""DiT and DiG beside DiT and DiG in PyTorch: forward, train step and sampling.

On a CPU: size S in float32. On a GPU: any size in bfloat16, with upstream's DiG over fla's kernels.

Each program is a process of its own; they run one after the other within each round, so that other work on
the machine slows all of them. PyTorch may be installed elsewhere, as its packages need not fit ours. Rows,
one per case and phase, are stored in peers.json as soon as they are there.
"""

import contextlib
import dataclasses
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

from benchmarks.compare import peers_page
from dig_jax.files.atomic import write_json

HERE = pathlib.Path(__file__).resolve().parent
RECORD = HERE / "peers.json"
WORKER = HERE / "pytorch_worker.py"
PHASES = ("forward", "train", "sample")
SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
HEADS = {("DiG", "XL"): 18}  # where they differ from DiT's
MODELS = ("DiT", "DiG")
# Network of pytorch_worker.py → its name in a row, and our model with the same parameters.
NETWORKS = {"DiT": ("PyTorch", "DiT"), "diffusers": ("diffusers", "DiT"), "DiG": ("fla", "DiG")}
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes to compare on one device.

    device: its kind, as JAX names it.
    size: a name of `SIZES`.
    pixels: height and width of the images; latents are an eighth of them.
    threads: of each program. With one thread of a CPU, the CPU time counts, as other programs may run.
    """

    device: str
    size: str
    pixels: int
    threads: int

    @property
    def images(self) -> int:
        """Images of a batch: on a GPU as many as have the pixels of one image of 1,024 px."""
        if self.device == "cpu":
            return 2 if self.pixels <= 256 else 1
        return max(1024**2 // self.pixels**2, 1)

    @property
    def steps(self) -> int:
        """Sampling steps."""
        return 1 if self.device == "cpu" and self.pixels > 512 else 20

    @property
    def dtype(self) -> str:
        """Dtype of products and activations."""
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def clock(self) -> str:
        """What a time is of: "cpu" or "wall"."""
        return "cpu" if self.threads == 1 and self.device == "cpu" else "wall"


def case_of(row: Row) -> Case:
    """Return the case of a row."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def find_networks(path: str | None, device: str) -> tuple[str, list[str]]:
    """Return a Python with PyTorch and the networks that it can run on a device.

    Args:
        path: the Python; None for this one, which may have no PyTorch and then no networks.
        device: kind of the device that ours run on.

    Raises:
        SystemExit: the given one has no PyTorch, or none for the GPU.
    """
    python = path or sys.executable
    if path is None and not importlib.util.find_spec("torch"):
        return python, []
    with contextlib.suppress(OSError):
        command, options = [python, str(WORKER)], {"env": _environment(device), "check": False}
        process = subprocess.run(command, capture_output=True, text=True, **options)
        if process.returncode == 0:
            found = json.loads(process.stdout)
            if (found["device"] == "cpu") == (device == "cpu"):
                return python, found["networks"]
    need = "`import torch` works" if device == "cpu" else "PyTorch finds the GPU"
    raise SystemExit(f"error: invalid --pytorch={python}; expected a Python in which {need}")


def _environment(device: str, threads: int = 1) -> dict[str, str]:
    """Return the environment of a worker: one device, and threads that do not work while they wait."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    if device == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if threads == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        return environment
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return environment | {"CUDA_VISIBLE_DEVICES": first, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Worker:
    """A worker process that runs commands and returns their times."""

    def __init__(self, command: list[str], options: Mapping[str, Any], environment: Mapping[str, str]):
        pipe = subprocess.PIPE
        command = [*command, json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
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
    case: Case, models: Sequence[str], python: str, networks: Sequence[str]
) -> Iterator[dict[str, Worker]]:
    """Yield the processes of a case by name, and end them."""
    common = {"side": case.pixels // 8, "batch": case.images, "steps": case.steps, "dtype": case.dtype}
    environment = _environment(case.device, case.threads)
    with contextlib.ExitStack() as stack:
        started = {}

        def start(name: str, command: list[str], options: Mapping[str, Any]) -> None:
            started[name] = Worker(command, options | common, environment)
            stack.callback(started[name].close)

        for network in networks:
            sizes = SIZES[case.size]
            heads = HEADS.get((network, case.size), sizes["heads"])
            start(NETWORKS[network][0], [python, str(WORKER)], {"network": network, **sizes, "heads": heads})
        for model in models:
            start(model, [sys.executable, str(HERE / "own_model.py")], {"model": f"{model}-{case.size}/2"})
        yield started


def checked(running: Mapping[str, Worker]) -> dict[str, float]:
    """Load the parameters of each network in PyTorch here, and return how much the outputs differ."""
    differences = {}
    for name, own in NETWORKS.values():
        if {name, own} <= running.keys():
            with tempfile.TemporaryDirectory() as folder:
                running[name](f"save={folder}/model.npz")
                differences[name] = running[own](f"check={folder}/model.npz")["difference"]
    return differences


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
    cases: Sequence[Case],
    models: Sequence[str],
    phases: Sequence[str],
    *,
    python: str,
    networks: Sequence[str],
    repeats: int,
    again: bool,
) -> None:
    """Measure, store and print the rows that are missing, or all of them again.

    Args:
        record: the file of the rows.
        cases, models, phases: what is measured of ours.
        python: a Python with PyTorch.
        networks: the networks that it runs, of `NETWORKS`.
        repeats: rounds after the first one.
        again: replace rows that are there.
    """
    names = {*models, *(NETWORKS[network][0] for network in networks)}
    done = {(case_of(row), row["phase"]) for row in read(record) if names <= row["median"].keys()}
    for case in cases:
        missing = [phase for phase in phases if again or (case, phase) not in done]
        if not missing:
            continue
        with workers(case, models, python, networks) as running:
            about: dict[str, Any] = {
                **dataclasses.asdict(case),
                "images": case.images,
                "sampling_steps": case.steps,
                "dtype": case.dtype,
                "clock": case.clock,
                "differences": checked(running),
                "about": {name: worker.about for name, worker in running.items()},
            }
            for phase in missing:
                figures = measured(running, phase, repeats)
                date = datetime.date.today().isoformat()
                row = {"phase": phase, **about, **figures, "date": date}
                kept = [other for other in read(record) if _key(other) != _key(row)]
                write_json(record, sorted([*kept, row], key=_key))
                print(f"{peers_page.name_of(row)}: {peers_page.describe(row)}", flush=True)


def _key(row: Row) -> tuple:
    """Return the order of rows. Of a case with different numbers of threads, the most come last."""
    return (
        row["device"],
        [*SIZES].index(row["size"]),
        row["pixels"],
        PHASES.index(row["phase"]),
        row["threads"],
    )
