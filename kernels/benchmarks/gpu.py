"""Checks and times the GPU kernels and their peers on one NVIDIA GPU.

    python kernels/benchmarks/gpu.py --out=DIR [--parts=check,time,jla,fla,jax_triton] [--quick] [--tune]

Every part runs in its own process, and every row is written to DIR/gpu.json immediately. A peer that cannot
be imported, or a kernel that crashes its process, becomes a row with the reason, and the next job runs.
`gpu_checks.py`, `gpu_jobs.py` and `gpu_peers.py` explain how results are checked and times measured.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Estimated minutes, and shares of the time limit. A part that ends early leaves its time to the next ones.
# All rows would take longer (check 3 minutes, time 6, fla 4, which autotunes slowly), but the most valuable
# ones come first: those of --quick take about two minutes each.
PARTS = {"check": 2.5, "time": 2.5, "jla": 0.5, "fla": 0.7, "jax_triton": 0.3}
PEERS = ("jla", "fla", "jax_triton")
PACKAGES = ("jax", "jaxlib", "torch", "triton", "fla-core", "jax-linear-attention", "jax-triton", "numpy")
# A job without output for this long is killed.
JOB_SECONDS = 300
# Exit code with which a child requests a new process, and so a new CUDA context.
RESTART = 75

Jobs = tuple[int, Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]]


def main() -> None:
    """Run all parts and print their table, or run one part as a child process."""
    options = arguments()
    if options.part:
        run_jobs(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / "gpu.json")
    began = time.time()
    parts = ["time"] if options.tune else options.parts.split(",")
    for i, part in enumerate(parts):
        share = sum(PARTS[name] for name in parts[: i + 1]) / sum(PARTS[name] for name in parts)
        supervise(part, record, began + share * options.seconds)
    print(table(record.rows))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="gpu_benchmark", help="directory for gpu.json")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, in this order")
    parser.add_argument("--quick", action="store_true", help="fewer checks, two shapes")
    parser.add_argument("--tune", action="store_true", help="time the candidates for tuning.py only")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU in interpret mode")
    parser.add_argument("--seconds", type=float, default=390, help="time limit; later jobs are skipped")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"invalid --parts: got {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}")
    return options


class Record:
    """All rows, in memory and on disk."""

    def __init__(self, path: pathlib.Path):
        self.path, self.rows = path, []
        self.about = {
            "command": " ".join(sys.argv),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
        }
        print(json.dumps(self.about, indent=1), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows.append(row)
        text = json.dumps(self.about | {"rows": self.rows}, indent=1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(self.path)


def device() -> str:
    """Return name, driver and memory of the GPUs."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"none: {error}"


def version(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# The parent: one process per part, restarted after a job that crashed it.


def supervise(part: str, record: Record, end: float) -> None:
    """Run a part until it finishes or until the time `end`."""
    job, total, began = -1, None, time.time()
    while total is None or job + 1 < total:
        command = [sys.executable, __file__, *sys.argv[1:]]
        command += [f"--part={part}", f"--start={job + 1}", f"--end={end}"]
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
            # Symbolizing the stack traces of Triton's remarks takes most of a compilation.
            "LLVM_DISABLE_SYMBOLIZATION": "1",
        }
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        before, identity, said = job, None, []
        timer = watchdog(child, end)
        for line in child.stdout:
            timer.cancel()
            timer = watchdog(child, end)
            kind, _, text = line.partition(" ")
            if kind == "JOBS":
                total = int(text)
            elif kind == "BEGIN":
                job, identity = job + 1, json.loads(text)
            elif kind == "ROW":
                row = {"part": part} | identity | json.loads(text)
                record.add(row)
                identity = None
                report(row, job + 1, total, began)
            else:
                said = [*said, line.rstrip()][-20:]
        timer.cancel()
        if child.wait() == 0:
            return
        if child.returncode != RESTART:
            killed = " (took too long)" if child.returncode == -signal.SIGKILL else ""
            reason = f"exit code {child.returncode}{killed}: " + " | ".join(filter(None, said[-6:]))
            record.add({"part": part, "name": part, **(identity or {}), "error": reason})
            report(record.rows[-1], job + 1, total or 0, began)
        if job == before or time.time() > end:
            return


def watchdog(child: subprocess.Popen, end: float) -> threading.Timer:
    """Kill a child that is silent for too long or runs long after its part's end."""
    timer = threading.Timer(min(JOB_SECONDS, max(10, end + 20 - time.time())), child.kill)
    timer.daemon = True
    timer.start()
    return timer


def report(row: dict[str, Any], done: int, total: int, began: float) -> None:
    """Print one line of progress."""
    passed = time.time() - began
    left = passed / max(done, 1) * (total - done)
    head = f"[{row['part']} {done}/{total}, {passed:.0f} s, about {left:.0f} s left]"
    print(f"{head} {describe(row)}", flush=True)


# The child.


def run_jobs(options: argparse.Namespace) -> None:
    """Run the jobs of one part and print what `supervise` reads."""
    total, jobs = jobs_of(options)
    print("JOBS", total, flush=True)
    for identity, job in jobs:
        print("BEGIN", json.dumps(identity), flush=True)
        out_of_time = time.time() > options.end
        try:
            row = {"error": "out of time; this and all later jobs skipped"} if out_of_time else job()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        print("ROW", json.dumps(row), flush=True)
        if out_of_time:
            return
        if "CUDA" in row.get("error", ""):
            raise SystemExit(RESTART)


def jobs_of(options: argparse.Namespace) -> Jobs:
    """Return the number of jobs in a part, and identity and function of those from `options.start` on."""
    if options.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if options.part in PEERS:
        return peer_jobs(options)
    import gpu_checks
    import gpu_jobs

    if options.part == "check":
        jobs, lower = gpu_checks.checks(options.quick), gpu_checks.lower
        if options.dry_run:
            jobs = gpu_checks.small_checks()
    else:
        jobs, lower = gpu_jobs.timings(options.quick, options.tune), gpu_jobs.TimingRun
        if options.dry_run:
            small = {"batch": 1, "tokens": 16, "heads": 1}
            ops = (("loop", None), ("copy", None), ("gla", "xla"), ("gated_gla_2d", "triton"))
            jobs = [gpu_jobs.Timing(op, implementation=name, **small) for op, name in ops]
            small |= {"implementation": "xla"}
            jobs += [gpu_jobs.Timing("gla", tangent=True, **small)]
            ops = ("copy", "gla", "selective_scan")
            jobs += [gpu_jobs.Timing(op, backward=True, **small) for op in ops]
    return len(jobs), compiled_jobs(jobs[options.start :], lambda job: lower(job, interpret=options.dry_run))


def compiled_jobs(jobs: list, lower: Callable) -> Iterator[tuple[dict, Callable]]:
    """Yield jobs that are JAX programs; 16 compile in parallel before any of them runs."""
    import gpu_jobs

    for job, run, compiled in gpu_jobs.compiled_in_groups(jobs, 16, lower):
        yield identity(job), lambda run=run, compiled=compiled: finish(run, compiled)


def identity(job: Any) -> dict[str, Any]:
    """Return the fields of a row that are set even if the job fails."""
    fields = ("batch", "tokens", "heads", "backward")
    return {"name": job.name} | {name: getattr(job, name) for name in fields if hasattr(job, "backward")}


def finish(run: Any, compiled: Any) -> dict[str, Any]:
    """Run a compiled job and return its row."""
    if isinstance(compiled, Exception):
        raise compiled
    return run.row(compiled)


def peer_jobs(options: argparse.Namespace) -> Jobs:
    """Return the jobs of a peer."""
    import gpu_peers

    if options.dry_run:
        raise SystemExit("--dry-run: peers need a GPU")
    timings = gpu_peers.peer_timings(options.quick)
    if options.part == "jax_triton":
        name = {"name": "fla output kernel by jax-triton"}
        return 1, iter([(name, lambda: gpu_peers.jax_triton_output_kernel(timings[0]))])
    # Values come last, because fla tunes its kernels for the first shape it runs.
    values = {"fla": gpu_peers.fla_values, "jla": gpu_peers.jla_values}[options.part]
    name = {"fla": "fla chunk_gla", "jla": "jla gla, K padded to 64"}[options.part]
    rest = timings[options.start :]

    def jobs():
        if options.part == "fla":
            yield from ((identity(x) | {"name": name}, lambda x=x: gpu_peers.fla_time(x)) for x in rest)
        else:
            yield from ((who | {"name": name}, job) for who, job in compiled_jobs(rest, gpu_peers.jla_run))
        yield {"name": f"{name}, values"}, values

    return len(timings) + 1, jobs()


# Output.

STANDARD = {
    "part",
    "name",
    "batch",
    "tokens",
    "heads",
    "backward",
    "bytes",
    "us",
    "us_median",
    "ps",
    "sets",
    "calls",
}


def describe(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    shape = ""
    if "tokens" in row:
        shape = f" {'forward+backward' if row['backward'] else 'forward'}"
        shape += f" B={row['batch']} T={row['tokens']} H={row['heads']}"
    if "error" in row:
        return f"{row['name']}{shape}: {row['error']}"
    if "errors" in row:
        worst = max(row["errors"], key=lambda name: nan_last(row["errors"][name]))
        verdict = "ok" if row["ok"] else f"WRONG (tolerance {row['tolerance']:g})"
        again = "" if row.get("repeatable", True) else ", NOT REPEATABLE"
        return f"{row['name']}: {verdict}, worst {worst} {row['errors'][worst]:.1e}{again}"
    text = f"{row['name']}{shape}: {row['us']:.1f} us (median {row['us_median']:.1f}), {row['ps']:.0f} ps"
    extra = {
        name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items() if name not in STANDARD
    }
    return text + "".join(f"; {name}: {x}" for name, x in extra.items())


def nan_last(x: float) -> float:
    """Return x, or infinity for NaN."""
    return math.inf if math.isnan(x) else x


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows as text: checks first, then a block per shape and pass."""
    lines = ["", "CHECKS", *(describe(row) for row in rows if "errors" in row)]
    times = [row for row in rows if "ps" in row]
    header = f"{'':42}{'us':>10}{'median':>10}{'ps':>8}{'of copy':>9}{'fla/this':>9}"
    for key in dict.fromkeys(map(block, times)):
        here = [row for row in times if block(row) == key]
        batch, tokens, heads, backward = key
        what = "forward and backward" if backward else "forward"
        lines += ["", f"{what}, B={batch} T={tokens} H={heads}, ps per token-head", header]
        copy = next((row["ps"] / row["bytes"] for row in here if row["name"] == "copy"), math.nan)
        fla = next((row["us"] for row in here if row["name"].startswith("fla chunk_gla")), math.nan)
        for row in here:
            of_copy = row["ps"] / (copy * row["bytes"])
            figures = f"{row['us']:10.1f}{row['us_median']:10.1f}{row['ps']:8.0f}"
            figures += f"{of_copy:9.2f}{fla / row['us']:9.2f}"
            lines.append(f"{row['name']:42}{figures}")
    failed = [f"{row['part']}: {describe(row)}" for row in rows if "error" in row]
    return "\n".join([*lines, "", f"FAILED OR SKIPPED: {len(failed)}", *failed])


def block(row: dict[str, Any]) -> tuple:
    """Return the key of a row's block."""
    return row["batch"], row["tokens"], row["heads"], row["backward"]


if __name__ == "__main__":
    main()
