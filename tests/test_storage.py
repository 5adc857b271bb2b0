"""Runs whose workdir is in object storage, against servers on this machine."""

import dataclasses
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from ended_runs import FIELDS, GLOO, assert_ended_alike, command, environment, joined
from flaky_proxy import Once
from object_storage import SCHEMES, create_bucket, directed, storage_servers  # noqa: F401 (fixtures)

import dig_jax
from dig_jax.config import Config
from dig_jax.convert.command import convert
from dig_jax.export.export import export
from dig_jax.files import paths
from dig_jax.files.paths import to_path
from dig_jax.sampling.sample import sample
from dig_jax.testing import tiny_settings
from dig_jax.training.train import train

ROOT = Path(__file__).parent.parent


def settings_of(steps: int, **changes) -> Config:
    fields = {
        "model__directions": 1,
        "training__steps": steps,
        "checkpoint__every_steps": 2,
        "checkpoint__keep": 2,
        "logging__every_steps": 1,
        "logging__heldout_every_steps": 2,
        "logging__tensorboard": True,
        "sampling__every_steps": 2,
    }
    return tiny_settings(**(fields | changes))


def download(workdir: str, target: Path) -> Path:
    """Copy a workdir to a local folder."""
    source = to_path(workdir)
    for file in paths.files_below(source):
        local = target / file.relative_to(source).as_posix()
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(file.read_bytes())
    return target


def uploads_to(folder: str):
    """Match requests that write below a folder."""
    return lambda method, path: method in ("POST", "PUT") and folder in path.replace("%2F", "/")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A local workdir with the run that the others must equal."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    train(settings_of(8), workdir)
    return workdir


@dataclasses.dataclass(frozen=True)
class Trained:
    workdir: str
    faults: dict[str, int]


@pytest.fixture(scope="module", params=["gs", pytest.param("s3", marks=pytest.mark.slow)])
def trained(request, storage_servers):  # noqa: F811
    """A run in a bucket that was resumed, whose server failed during two saves."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage_servers.environment.items():
            patch.setenv(name, value)
        workdir = f"{create_bucket(request.param, storage_servers)}/runs/one"
        proxy, faults = storage_servers.proxies[request.param], {}
        train(settings_of(4), to_path(workdir))
        for steps, fault in (
            (6, Once("unavailable", uploads_to("/checkpoints/6/"), seconds=3)),
            (8, Once("drop", uploads_to("/checkpoints/8/state/"))),
        ):
            before, proxy.fault = proxy.faults, fault
            train(settings_of(steps), to_path(workdir))
            faults[fault.kind] = proxy.faults - before
        proxy.fault = lambda method, path: None
        yield Trained(workdir, faults)


def test_a_server_that_fails_during_a_save_costs_nothing(trained, local, tmp_path):
    assert trained.faults["unavailable"] >= 1
    assert trained.faults["drop"] == 1
    copy = download(trained.workdir, tmp_path / "copy")
    assert_ended_alike(copy, local, 8)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["6", "8"]


def test_all_files_of_a_run_arrive(trained, local, tmp_path):
    copy = download(trained.workdir, tmp_path / "copy")
    names = {path.name for path in local.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "report.html", "samples.png", "starts.jsonl"}
    assert {path.name for path in copy.iterdir()} == names
    assert (copy / "samples.png").read_bytes() == (local / "samples.png").read_bytes()
    assert (copy / "starts.jsonl").read_text().count("\n") == 3
    assert len(list((copy / "tensorboard").iterdir())) == 3
    assert {path.name for path in (copy / "samples").iterdir()} == {"2.png", "4.png", "6.png", "8.png"}


def test_a_run_in_object_storage_is_loaded_exported_and_continued(trained, local, directed, tmp_path):  # noqa: F811
    images = dig_jax.load(local)(seeds=[0, 1])
    np.testing.assert_array_equal(dig_jax.load(trained.workdir)(seeds=[0, 1]), images)
    np.testing.assert_array_equal(dig_jax.load(f"{trained.workdir}/checkpoints/8")(seeds=[0, 1]), images)
    exported = trained.workdir.replace("one", "exported/x.safetensors")
    export(settings_of(8), to_path(trained.workdir), to_path(exported))
    np.testing.assert_array_equal(dig_jax.load(exported)(seeds=[0, 1]), images)
    export(settings_of(8), to_path(trained.workdir), to_path(exported))  # is there already
    for source in (trained.workdir, exported):
        settings = dataclasses.replace(settings_of(1, sampling__every_steps=0), init_from=source)
        train(settings, tmp_path / Path(source).name)


@pytest.mark.slow
def test_a_run_that_was_copied_to_a_bucket_goes_on_and_keeps_its_checkpoints(directed, local, tmp_path):  # noqa: F811
    copy = to_path(f"{create_bucket('gs', directed)}/copied")
    for file in paths.files_below(local):
        paths.upload(file, copy / file.relative_to(local).as_posix())
    train(settings_of(9, checkpoint__keep=3), copy)
    assert [path.name for path in paths.children(copy / "checkpoints")] == ["6", "8", "9"]
    same = shutil.copytree(local, tmp_path / "same")
    train(settings_of(9, checkpoint__keep=3), same)
    assert_ended_alike(download(str(copy), tmp_path / "copy"), same, 9)


def test_sets_of_images_arrive_and_are_not_drawn_again(trained, local, directed, caplog):  # noqa: F811
    caplog.set_level("INFO")
    workdir = to_path(trained.workdir)
    for _ in range(2):
        sample(settings_of(8), workdir, seeds=np.arange(3))
    assert "already holds these 3 images" in caplog.messages[-1]
    with paths.local_copy(workdir / "generated.npz") as copy, np.load(copy) as found:
        np.testing.assert_array_equal(found["arr_0"], dig_jax.load(local)(seeds=[0, 1, 2]))
    assert (workdir / "generated.png").exists()
    assert not (workdir / "generated").exists()
    with pytest.raises(dig_jax.UserError, match="another set"):
        sample(settings_of(8), workdir, seeds=np.arange(4))


def test_conversions_read_and_write_object_storage(trained, local, directed):  # noqa: F811
    folder = to_path(trained.workdir).parent
    convert(folder / "one", folder / "upstream.safetensors")
    convert(folder / "upstream.safetensors", folder / "converted", num_heads=1, directions=1)
    convert(folder / "one", folder / "upstream.pt")
    convert(local, local.parent / "upstream.pt")
    assert (folder / "upstream.pt").read_bytes() == (local.parent / "upstream.pt").read_bytes()
    images = [dig_jax.load(path)(seeds=[5]) for path in (folder / "one", folder / "converted")]
    assert images[0].shape == images[1].shape


def newest_step(workdir: str) -> int:
    folders = paths.children(to_path(workdir) / "checkpoints")
    return max((int(path.name) for path in folders if (path / "commit_success.txt").exists()), default=0)


@pytest.mark.parametrize(
    ("scheme", "processes", "kills"),
    [
        pytest.param("gs", 1, 2, marks=pytest.mark.slow),
        pytest.param("s3", 1, 2, marks=pytest.mark.slow),
        pytest.param("gs", 2, 2, marks=pytest.mark.slow),
        pytest.param("s3", 2, 2, marks=pytest.mark.slow),
        pytest.param("gs", 1, 15, marks=pytest.mark.slow),
        pytest.param("s3", 1, 15, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_in_object_storage_ends_bit_identical(
    scheme,
    processes,
    kills,
    directed,  # noqa: F811
    tmp_path,
):
    steps, random = 4 * kills + 4, np.random.default_rng(0)
    fields = FIELDS | {"training.accumulation": 1, "training.steps": steps, "mesh.cpu_devices": 1}

    def start(workdir) -> list[subprocess.Popen]:
        env = environment(tmp_path / "compiled") | (GLOO if processes > 1 else {})
        return [
            subprocess.Popen(
                command("smoke", workdir, fields, *own), cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
            )
            for own in joined(processes)
        ]

    def finish(runs: list[subprocess.Popen]) -> str:
        logs = [run.communicate(timeout=300)[1] for run in runs]
        assert [run.returncode for run in runs] == [0] * processes, logs
        return logs[0]

    finish(start(tmp_path / "uninterrupted"))
    workdir = f"{create_bucket(scheme, directed)}/runs/killed"
    for step in range(2, 4 * kills, 4):  # kill it soon after the marker of this step or a later one is seen
        runs = start(workdir)
        while newest_step(workdir) < step and runs[0].poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2) if step > 6 else 0)
        for run in runs:
            run.kill()
        assert {run.wait() for run in runs} == {-signal.SIGKILL}
        for run in runs:
            run.stderr.close()
    resumed = newest_step(workdir)
    assert f"resuming after step {resumed} of {steps} in {workdir}" in finish(start(workdir))
    assert_ended_alike(download(workdir, tmp_path / "killed"), tmp_path / "uninterrupted", steps)


def test_a_bucket_that_does_not_exist_is_one_line(directed):  # noqa: F811
    for scheme in SCHEMES:
        with pytest.raises(
            dig_jax.UserError, match=f"cannot write to {scheme}://no-such-bucket/run: no such bucket"
        ) as error:
            train(settings_of(1), to_path(f"{scheme}://no-such-bucket/run"))
        assert "\n" not in str(error.value)
        with pytest.raises(dig_jax.CheckpointError, match="no checkpoint in"):
            dig_jax.load(f"{scheme}://no-such-bucket/run")
