import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from ended_runs import (
    GLOO,
    assert_ended_alike,
    command,
    environment,
    free_port,
    joined,
    records,
    state_at,
)

from dig_jax.checkpoints.reader import read_config
from dig_jax.errors import ConfigError
from dig_jax.export.export import export
from dig_jax.parallel import initialize_distributed

ROOT = Path(__file__).parent.parent
# The digits' own config, with one block, and little to draw at the end.
FIELDS = {
    "model.depth": 1,
    "model.hidden_size": 32,
    "model.num_heads": 1,
    "data.batch_size": 16,
    "training.steps": 20,
    "optimizer.schedule": "constant",
    "checkpoint.every_steps": 20,
    "logging.every_steps": 1,
    "logging.heldout_every_steps": 0,
    "logging.tensorboard": False,
    "sampling.every_steps": 0,
    "sampling.images_per_class": 1,
    "sampling.steps": 2,
    "evaluation.num_images": 0,
    "mesh.cpu_devices": 1,
}


# Of two processes, each of which then holds and saves a part of the parameters.
SPLIT = {"mesh__data": 1, "mesh__fsdp": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def digits(workdir: Path, *arguments: str, **fields) -> list[str]:
    changed = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    return command("digits", workdir, changed, *arguments)


def start(commands: Sequence[Sequence[str]], cache: Path, **options) -> list[subprocess.Popen]:
    options |= {"cwd": ROOT, "env": environment(cache) | GLOO, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(arguments, **options) for arguments in commands]


def run(commands: Sequence[Sequence[str]], cache: Path) -> list[tuple[int, str]]:
    """Exit status and log of processes that run at the same time."""
    return ended(start(commands, cache))


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    logs = [process.communicate()[1] for process in processes]
    return [(process.returncode, log) for process, log in zip(processes, logs, strict=True)]


def train(workdir: Path, processes: int = 1, **fields) -> None:
    results = run([digits(workdir, *own, **fields) for own in joined(processes)], workdir.parent / "compiled")
    for status, log in results:
        assert status == 0, log


def examples(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def assert_like_one(workdir: Path, one: Path, step: int) -> None:
    """Parameters to 1e-5, the data at the same place, and each step's record once, with the same loss."""
    ours, theirs = (jax.tree.leaves(state_at(path, step)["params"]) for path in (workdir, one))
    difference = sum(np.sum(np.square(a - b)) for a, b in zip(ours, theirs, strict=True))
    assert difference <= 1e-10 * sum(np.sum(np.square(b)) for b in theirs)
    assert examples(workdir, step) == examples(one, step)
    assert examples(workdir, step)["examples"] == step * FIELDS["data.batch_size"]
    # The loss of a step depends on which images it sees: one that is seen twice or left out would show.
    assert [record["step"] for record in records(workdir)] == list(range(1, step + 1))
    losses, expected = ([record["loss"] for record in records(path)[:step]] for path in (workdir, one))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def one(directory):
    """The workdir of one process, with checkpoints of 20 and 24 steps."""
    train(directory / "one", training__steps=24)
    return directory / "one"


@pytest.fixture(scope="module")
def two(directory):
    """The workdir of two processes, not to be written to."""
    train(directory / "two", processes=2, **SPLIT)
    return directory / "two"


def test_two_processes_train_as_one_does_and_one_goes_on_from_them(one, two, directory):
    assert_like_one(two, one, 20)
    assert (two / "samples.png").exists()
    workdir = shutil.copytree(two, directory / "two_then_one")
    train(workdir, training__steps=24)
    assert_like_one(workdir, one, 24)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_go_on_from_before_a_damaged_checkpoint(two, directory):
    workdir = directory / "killed"
    commands = [digits(workdir, *own, **SPLIT, checkpoint__every_steps=5) for own in joined(2)]
    first, second = start(commands, directory / "compiled")
    newest = workdir / "checkpoints" / "10"
    while not newest.exists() and first.poll() is None:
        time.sleep(0.001)
    second.kill()
    log = first.communicate(timeout=300)[1]
    second.communicate()
    assert first.returncode == 1, log
    assert log.splitlines()[-1].startswith("error: another process has ended (")
    assert "Traceback" not in log
    for damaged in newest.parent.glob("??/state/_METADATA"):
        damaged.unlink()
    train(workdir, processes=2, **SPLIT)
    assert (newest.parent / "10.unreadable").is_dir()
    assert_ended_alike(workdir, two, 20)


@pytest.mark.slow
def test_four_processes_train_as_one_does_and_one_or_four_go_on_from_them(one, directory):
    workdir = directory / "four"
    train(workdir, processes=4, mesh__fsdp=2)
    assert_like_one(workdir, one, 20)
    then_one = shutil.copytree(workdir, directory / "four_then_one")
    train(then_one, training__steps=24)
    train(workdir, processes=4, training__steps=24)
    for ended in (workdir, then_one):
        assert_like_one(ended, one, 24)


@pytest.mark.slow
def test_processes_that_split_rows_or_heads_read_the_same_images_and_train_as_one_does(one, directory):
    train(directory / "rows", processes=2, mesh__data=1, mesh__context=2)
    assert_like_one(directory / "rows", one, 20)


def test_processes_that_were_given_different_settings_all_stop_and_write_nothing(directory):
    workdir = directory / "disagreeing"
    steps = (20, 21)
    commands = [digits(workdir, *own, training__steps=n) for own, n in zip(joined(2), steps, strict=True)]
    for number, (status, log) in enumerate(run(commands, directory / "compiled")):
        assert status == 2
        assert log.splitlines()[-1] == (
            f"error: processes have different settings: process {number} has"
            f" config.training.steps={steps[number]}; expected the same command on all processes"
        )
    assert not workdir.exists()


def test_settings_that_a_workdir_did_not_begin_with_stop_all_processes_with_one_line(two, directory):
    commands = [digits(two, *own, **SPLIT, seed=1) for own in joined(2)]
    before = (two / "config.json").read_bytes()
    for status, log in run(commands, directory / "compiled"):
        assert status == 2
        assert log.splitlines()[-1].startswith(
            f"error: {two} was created with different settings: seed: 0 → 1. "
        )
        assert "Traceback" not in log
    assert (two / "config.json").read_bytes() == before


def test_a_workdir_that_not_all_processes_share_stops_them_with_one_line(directory):
    """The same path leads each to a folder of its own."""
    folders = [directory / name for name in ("own", "another")]
    number, processes = os.open(directory, os.O_RDONLY), []
    workdir = Path(f"/proc/self/fd/{number}/run")
    for folder, own in zip(folders, joined(2), strict=True):
        folder.mkdir()
        os.dup2(os.open(folder, os.O_RDONLY), number)
        processes += start([digits(workdir, *own)], directory / "compiled", pass_fds=[number])
    for status, log in ended(processes):
        assert status == 1
        assert log.splitlines()[-1] == (
            f"error: process 1 does not see the files that process 0 writes to {workdir};"
            " expected a directory on a file system that all hosts share"
        )
    assert [path.name for path in folders[0].rglob("*")] == ["run", "config.json"]
    assert not any(folders[1].iterdir())


@pytest.mark.slow
def test_two_processes_start_from_a_workdir_or_an_exported_file_as_one_does(one, directory):
    exported = directory / "one.safetensors"
    export(read_config(one), one, exported)
    for source in (one, exported):
        workdir = directory / f"from_{source.name}"
        train(workdir, processes=2, **SPLIT, init_from=str(source))
        alone = directory / f"alone_from_{source.name}"
        train(alone, init_from=str(source))
        assert_like_one(workdir, alone, 20)


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_find_each_other_say_where_they_looked(directory, process):
    port = free_port()
    own = [*joined(2, port)[process], "--join_timeout=3"]
    [(status, log)] = run([digits(directory / "alone", *own)], directory / "compiled")
    assert status == 1
    assert log.splitlines()[-1] == (
        "error: the processes did not connect within 3 seconds: the coordinator is"
        f" 127.0.0.1:{port}; expected it to be reachable from all hosts, and all processes to be running"
    )
    assert "Traceback" not in log
    assert not (directory / "alone").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 2, 0), "invalid --coordinator=host; expected ADDRESS:PORT"),
        (("host:1", 2, 2), "invalid --process_id=2; expected 0 to 1 with --num_processes=2"),
        ((None, 2, 0), "--coordinator, --num_processes and --process_id: what JAX says"),
    ],
)
def test_flags_that_do_not_describe_processes_are_refused(arguments, message, monkeypatch):
    def refuse(**_):
        raise ValueError("what JAX says")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ConfigError, match=message):
        initialize_distributed(*arguments)
    initialize_distributed()  # neither flags nor an environment of several: alone
