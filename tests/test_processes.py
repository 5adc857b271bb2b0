import json
import os
import shutil
import socket
import subprocess
import sys
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
from PIL import Image

from configs import smoke as smoke_config
from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.reader import read_config
from dig_jax.errors import ConfigError, UserError
from dig_jax.export.export import export
from dig_jax.files.atomic import write_json
from dig_jax.parallel import initialize_distributed
from dig_jax.testing import tiny_settings
from dig_jax.training import train as training

ROOT = Path(__file__).parent.parent
STEPS, MORE_STEPS = 8, 10
# configs/smoke.py with one block, whose mixer compiles fast, and few samples.
FIELDS = {
    "model.name": "DiT-S/2",
    "model.depth": 1,
    "model.hidden_size": 32,
    "data.batch_size": 16,
    "training.steps": STEPS,
    "checkpoint.every_steps": STEPS,
    "logging.every_steps": 1,
    "logging.heldout_every_steps": 0,
    "logging.tensorboard": False,
    "sampling.every_steps": 0,
    "sampling.images_per_class": 1,
    "sampling.steps": 2,
    "mesh.cpu_devices": 1,
}


# Two processes that each hold and save a shard of the parameters.
SPLIT = {"mesh__data": 1, "mesh__fsdp": 2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def fields(**changes) -> dict[str, object]:
    """`seed=1` or `mesh__data=1` set a field."""
    return FIELDS | {name.replace("__", "."): value for name, value in changes.items()}


def smoke(workdir: Path, *arguments: str, **changes) -> list[str]:
    return command("smoke", workdir, fields(**changes), *arguments)


def train_alone(workdir: Path, **changes) -> None:
    """Train on one device of this process."""
    c = smoke_config.get_config()
    for name, value in fields(mesh__data=1, **changes).items():
        c.update_from_flattened_dict({name: value})
    training.train(config.from_dict(c.to_dict()), workdir)


def start(commands: Sequence[Sequence[str]], cache: Path, **options) -> list[subprocess.Popen]:
    env = environment(cache) | GLOO | {"PYTHONPATH": os.pathsep.join(sys.path)}
    options |= {"cwd": ROOT, "env": env, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(arguments, **options) for arguments in commands]


def run(commands: Sequence[Sequence[str]], cache: Path) -> list[tuple[int, str]]:
    """Run processes at the same time; return exit status and log of each."""
    return ended(start(commands, cache))


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    logs = [process.communicate()[1] for process in processes]
    return [(process.returncode, log) for process, log in zip(processes, logs, strict=True)]


def train(workdir: Path, processes: int, **changes) -> None:
    results = run([smoke(workdir, *own, **changes) for own in joined(processes)], workdir.parent / "compiled")
    for status, log in results:
        assert status == 0, log


def examples(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def assert_like_one(workdir: Path, one: Path, step: int, batch_size: int = FIELDS["data.batch_size"]) -> None:
    """Compare parameters to 1e-5, the position in the data, and the loss of each step."""
    ours, theirs = (jax.tree.leaves(state_at(path, step)["params"]) for path in (workdir, one))
    difference = sum(np.sum(np.square(a - b)) for a, b in zip(ours, theirs, strict=True))
    assert difference <= 1e-10 * sum(np.sum(np.square(b)) for b in theirs)
    assert examples(workdir, step) == examples(one, step)
    assert examples(workdir, step)["examples"] == step * batch_size
    # The loss of a step depends on its images, so it would show one that is repeated or left out.
    assert [record["step"] for record in records(workdir)] == list(range(1, step + 1))
    losses, expected = ([record["loss"] for record in records(path)[:step]] for path in (workdir, one))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def one(directory):
    """The workdir of one process, with checkpoints of STEPS and MORE_STEPS."""
    train_alone(directory / "one", training__steps=MORE_STEPS)
    return directory / "one"


@pytest.fixture(scope="module")
def two(directory):
    """The workdir of two processes, not to be written to."""
    train(directory / "two", processes=2, **SPLIT)
    return directory / "two"


def test_two_processes_train_like_one_and_one_resumes_from_them(one, two, directory):
    assert_like_one(two, one, STEPS)
    assert (two / "samples.png").exists()
    workdir = shutil.copytree(two, directory / "two_then_one")
    train_alone(workdir, training__steps=MORE_STEPS)
    assert_like_one(workdir, one, MORE_STEPS)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_resume_before_a_corrupt_checkpoint(directory):
    settings = SPLIT | {"training__steps": 20}
    train(directory / "not killed", processes=2, **settings)
    workdir = directory / "killed"
    commands = [smoke(workdir, *own, **settings, checkpoint__every_steps=5) for own in joined(2)]
    first, second = start(commands, directory / "compiled")
    newest = workdir / "checkpoints" / "10"
    while not newest.exists() and first.poll() is None:
        time.sleep(0.001)
    second.kill()
    log = first.communicate(timeout=300)[1]
    second.communicate()
    assert first.returncode == 1, log
    assert log.splitlines()[-1].startswith("error: another process failed (")
    assert "Traceback" not in log
    for damaged in newest.parent.glob("??/state/_METADATA"):
        damaged.unlink()
    train(workdir, processes=2, **settings)
    assert (newest.parent / "10.unreadable").is_dir()
    assert_ended_alike(workdir, directory / "not killed", 20)


@pytest.mark.slow
def test_four_processes_train_like_one_and_one_or_four_resume_from_them(one, directory):
    workdir = directory / "four"
    train(workdir, processes=4, mesh__fsdp=2)
    assert_like_one(workdir, one, STEPS)
    then_one = shutil.copytree(workdir, directory / "four_then_one")
    train_alone(then_one, training__steps=MORE_STEPS)
    train(workdir, processes=4, training__steps=MORE_STEPS)
    for ended in (workdir, then_one):
        assert_like_one(ended, one, MORE_STEPS)


@pytest.mark.slow
def test_processes_that_shard_rows_read_the_same_images_and_train_like_one(directory):
    scans = {"model__name": "DiG-S/2"}
    train_alone(directory / "all rows", **scans)
    train(directory / "rows", processes=2, **scans, mesh__data=1, mesh__context=2)
    assert_like_one(directory / "rows", directory / "all rows", STEPS)


@pytest.mark.slow
def test_processes_with_buckets_train_like_one_and_one_resumes_from_them(directory):
    """Two processes with two devices each, against one process with two."""
    images = directory / "shapes" / "images"
    images.mkdir(parents=True)
    for number in range(24):
        size = (9, 9) if number < 12 else (20, 6)
        Image.new("L", size, 10 * number).save(images / f"{number:02}.png")
    changes = {
        "model__name": "DiT-S/2",
        "data__batch_size": 4,
        "data__options.image_size": 8,
        "data__buckets": "8x8,4x16",
        "mesh__cpu_devices": 2,
    }

    def commands(workdir: Path, processes: int, steps: int, **mesh) -> list[list[str]]:
        own = fields(training__steps=steps, **changes, **mesh)
        name = f"imagefolder_small.py:{images.parent}"
        return [command(name, workdir, own, *flags) for flags in joined(processes)]

    workdir, alone, compiled = directory / "buckets", directory / "buckets alone", directory / "compiled"
    for number, mesh in ((1, {"mesh__data": 2}), (2, {"mesh__data": 2, "mesh__fsdp": 2})):
        results = run(commands((alone, workdir)[number - 1], number, STEPS, **mesh), compiled)
        assert [status for status, _ in results] == [0] * number, results
        assert "training images by bucket: 8x8: 11, 4x16: 12" in results[0][1]
    assert_like_one(workdir, alone, STEPS, batch_size=4)
    for path in (workdir, alone):
        ((status, log),) = run(commands(path, 1, MORE_STEPS, mesh__data=2), compiled)
        assert status == 0, log
    assert_like_one(workdir, alone, MORE_STEPS, batch_size=4)


def test_processes_with_different_settings_all_stop_and_write_nothing(directory):
    workdir = directory / "disagreeing"
    steps = (20, 21)
    commands = [smoke(workdir, *own, training__steps=n) for own, n in zip(joined(2), steps, strict=True)]
    for number, (status, log) in enumerate(run(commands, directory / "compiled")):
        assert status == 2
        assert log.splitlines()[-1] == (
            f"error: processes have different settings: process {number} has"
            f" config.training.steps={steps[number]}; expected the same command on all processes"
        )
    assert not workdir.exists()


def test_processes_take_steps_together_and_fail_together(directory):
    folder = directory / "steps"
    (folder / "run" / "checkpoints" / "1").mkdir(parents=True)
    write_json(folder / "run" / "config.json", config_and_versions(tiny_settings()))
    before = (folder / "run" / "config.json").read_bytes()
    port, script = free_port(), [sys.executable, "tests/process_steps.py"]
    processes = start(
        [[*script, str(port), str(number), str(folder)] for number in range(2)],
        directory / "compiled",
        stdout=subprocess.PIPE,
    )
    written = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [3, 9], written
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in written)
    for number, outcomes in enumerate((first, second)):
        assert outcomes["same settings"] is None
        assert outcomes["different settings"] == [
            f"processes have different settings: process {number} has config.training.steps={20 + number};"
            " expected the same command on all processes",
            True,
        ]
        assert outcomes["broadcast"] == {"index": 0}
        assert outcomes["gather"] == [[0, 1 / 3], [0, 1 / 3, 2 / 3]]
        assert outcomes["gather in parts"] == [0, 100]
        assert outcomes["sizes beyond int32"] == [3 * 2**31, 3 * 2**31 + 1]
        assert outcomes["rejection"] == ["rejected by process 0", True]
        assert outcomes["without"] == [1]
        assert outcomes["shared workdir"] is None
        message, is_config_error = outcomes["workdir of different settings"]
        assert message.startswith(f"{folder / 'run'} was created with different settings: ")
        assert is_config_error
        assert outcomes["workdirs of their own"] == [
            "process 1 does not see the files that process 0 writes to /proc/self/fd/100/run;"
            " expected a directory on a file system that all hosts share",
            False,
        ]
    assert first["peer failure"] is True
    assert (folder / "run" / "config.json").read_bytes() == before
    assert not any((folder / "own 1").iterdir())


@pytest.mark.slow
def test_two_processes_start_from_a_workdir_or_an_exported_file_like_one(one, directory):
    exported = directory / "one.safetensors"
    export(read_config(one), one, exported)
    for source in (one, exported):
        workdir = directory / f"from_{source.name}"
        train(workdir, processes=2, **SPLIT, init_from=str(source))
        alone = directory / f"alone_from_{source.name}"
        train_alone(alone, init_from=str(source))
        assert_like_one(workdir, alone, STEPS)


def test_processes_that_do_not_connect_say_what_they_expected(directory):
    """The coordinator without process 1, and process 1 without its coordinator."""
    ports = [free_port(), free_port()]
    flags = [[*joined(2, port)[number], "--join_timeout=1"] for number, port in enumerate(ports)]
    results = run([smoke(directory / "alone", *own) for own in flags], directory / "compiled")
    for port, (status, log) in zip(ports, results, strict=True):
        assert status == 1
        assert log.splitlines()[-1] == (
            f"error: the processes did not connect within 1 seconds (coordinator: 127.0.0.1:{port}); expected"
            " all processes to be running and the coordinator to be reachable from all hosts"
        )
        assert "Traceback" not in log
    assert not (directory / "alone").exists()


def test_a_port_that_is_in_use_is_one_line():
    """JAX would crash."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of this host is in use; choose another port"):
            initialize_distributed(f"127.0.0.1:{port}", 2, 0)


def test_a_port_that_slurm_chose_and_is_in_use_is_one_line(monkeypatch):
    for name, value in {"JOB_ID": "7", "STEP_NODELIST": "node[1-2]", "NTASKS": "2", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_PORT", str(port))
        message = f"port {port} of this host is in use; choose another port in .* JAX_COORDINATOR_PORT"
        with pytest.raises(UserError, match=message):
            initialize_distributed()


def test_a_second_start_in_one_process_runs_alone_like_the_first(monkeypatch):
    def refuse(**_):
        raise RuntimeError("jax.distributed.initialize() must be called before any JAX calls")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    initialize_distributed()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:70000", 2, 0), "invalid --coordinator=host:70000; expected ADDRESS:PORT"),
        (
            (None, None, None, float("nan")),
            "invalid --join_timeout=nan; expected a positive",
        ),
        (
            (None, None, None, float("inf")),
            "invalid --join_timeout=inf; expected a positive",
        ),
        (("host", 2, 0), "invalid --coordinator=host; expected ADDRESS:PORT"),
        (("host:1", 2, 2), "invalid --process_id=2; expected 0 to 1 with --num_processes=2"),
        ((None, 2, 0), "--coordinator, --num_processes and --process_id: what JAX says"),
    ],
)
def test_flags_that_do_not_describe_processes_are_rejected(arguments, message, monkeypatch):
    def refuse(**_):
        raise ValueError("what JAX says")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ConfigError, match=message):
        initialize_distributed(*arguments)
    initialize_distributed()  # without flags and environment variables: one process
