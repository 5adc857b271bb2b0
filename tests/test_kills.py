import contextlib
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from ended_runs import FIELDS, GLOO, assert_ended_alike, command, environment, joined

ROOT = Path(__file__).parent.parent


def start(workdir: Path, *arguments: str, optimized: bool = False) -> subprocess.Popen:
    """Start a run whose compiled programs are kept beside the workdir."""
    fields = FIELDS | {"model.name": "DiG-S/2", "training.accumulation": 1, "training.steps": 24}
    env = environment(workdir.parent / "compiled", optimized=optimized) | GLOO
    run = command("smoke", workdir, fields, *arguments)
    return subprocess.Popen(run, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(run: subprocess.Popen) -> str:
    _, stderr = run.communicate()
    assert run.returncode == 0, stderr
    return stderr


def wait_until(happened: Callable[[], bool], run: subprocess.Popen, after: float = 0.0) -> None:
    """Wait until something happened and `after` seconds have passed, or until the run has ended."""
    while run.poll() is None and not happened():
        time.sleep(0.001)
    time.sleep(after)


def signal_when(run: subprocess.Popen, happened: Callable[[], bool], number: int = signal.SIGKILL) -> str:
    """Send the run a signal when something has happened; return its log."""
    wait_until(happened, run)
    run.send_signal(number)
    return run.communicate()[1]


def was_written(path: Path, since: float) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime > since
    return False


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("killed") / "uninterrupted"
    finish(start(workdir))
    assert {"samples.png", "loss.png"} <= {path.name for path in workdir.iterdir()}
    return workdir


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_a_run_that_is_terminated_and_then_killed_ends_bit_identical(uninterrupted):
    workdir = uninterrupted.with_name("stopped_twice")
    run = start(workdir, "--config.checkpoint.every_steps=1000")
    stderr = signal_when(run, lambda: last_step(workdir) >= 5, signal.SIGTERM)
    assert run.returncode == 0, stderr
    *_, preempted, resuming = stderr.splitlines()
    step = int(re.fullmatch(r"preempted: saved step (\d+) of 24", preempted)[1])
    assert resuming.startswith("to resume: python main.py --config=configs/smoke.py --workdir=")
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(step)]
    assert last_step(workdir) == step

    run = start(workdir)
    stderr = signal_when(run, lambda: last_step(workdir) >= step + 5)
    assert f"resuming after step {step} of 24 in " in stderr
    assert run.returncode == -signal.SIGKILL
    assert not (workdir / "checkpoints" / "24").exists()
    assert re.search(r"resuming after step \d+ of 24 in ", finish(start(workdir)))
    assert_ended_alike(workdir, uninterrupted, 24)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills", "steps"), [(1, 20, 300), (2, 10, 60)])
def test_a_run_that_is_stopped_many_times_ends_bit_identical(tmp_path, processes, kills, steps):
    changes = (f"--config.training.steps={steps}", "--config.checkpoint.every_steps=1")

    def start_all(workdir: Path) -> list[subprocess.Popen]:
        return [start(workdir, *changes, *own, optimized=True) for own in joined(processes)]

    def finish_all(workdir: Path) -> None:
        for run in start_all(workdir):
            finish(run)

    finish_all(tmp_path / "uninterrupted")
    workdir, chance = tmp_path / "killed", random.Random(0)
    for kill in range(kills):
        before, began = last_step(workdir), time.time()
        new = partial(was_written, since=began)
        happened = (
            # Written when the processes have joined, just before they restore.
            lambda new=new: new(workdir / "config.json"),
            lambda before=before: last_step(workdir) not in (0, before),
            lambda new=new: any(map(new, workdir.glob("checkpoints/*tmp*/state*"))),
        )[kill % 3]
        after = chance.uniform(0, 0.1 if kill % 3 else 2)
        number = chance.choice((signal.SIGKILL, signal.SIGTERM))
        runs = start_all(workdir)
        hit = chance.choice([runs, *([run] for run in runs)])
        wait_until(happened, runs[0], after)
        for run in hit:
            run.send_signal(number)
        logs = [run.communicate(timeout=300)[1] for run in runs]
        for run, log in zip(runs, logs, strict=True):
            if number == signal.SIGTERM:
                # A single process that is terminated before its first step has nothing to save.
                assert run.returncode in ((0, -number) if processes == 1 else (0,)), log
            else:
                assert run.returncode == -number if run in hit else run.returncode, log
        newest = max(
            (int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0
        )
        # A row is written before its step is saved, and a save waits for the previous one.
        assert last_step(workdir) - 2 <= newest < steps
    finish_all(workdir)
    assert_ended_alike(workdir, tmp_path / "uninterrupted", steps)


def test_a_full_disk_ends_the_run_with_one_line(tmp_path):
    workdir, limit = tmp_path / "run", (30_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    run = start(workdir, "--config.model.name=DiT-S/2", "--config.training.steps=1000")
    wait_until((workdir / "checkpoints" / "6").exists, run)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, limit)
    _, stderr = run.communicate()
    *lines, last = stderr.splitlines()
    assert run.returncode == 1
    assert not any(line.startswith((" ", "Traceback")) for line in lines if "loss" not in line), stderr
    step = int(re.match(r"error: checkpoint (\d+) could not be written to ", last)[1])
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [step - 6, step - 4, step - 2]
