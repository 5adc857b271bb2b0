import contextlib
import dataclasses
import os
import resource
import shutil
import stat
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint._src.serialization import ocdbt_utils

from configs import smoke
from dig_jax import config
from dig_jax.checkpoints import manager, reader
from dig_jax.checkpoints.integrity import find_corruption, write_record
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.reader import has_checkpoints, read_checkpoint, read_config
from dig_jax.data import ImageSpec
from dig_jax.errors import CheckpointError
from dig_jax.parallel import batch_sharding, make_mesh, replicated

SETTINGS = config.from_dict(smoke.get_config().to_dict())
IMAGES = ImageSpec((8, 8, 3), ("cat", "dog"))


@contextlib.contextmanager
def not_root():
    """Run as `nobody` if the tests run as root, which may write everywhere."""
    user = os.geteuid()
    if user == 0:
        if not all(os.stat(place).st_mode & stat.S_IXOTH for place in Path(pytest.__file__).parents):
            pytest.skip("the user nobody cannot read the Python environment")
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def make_state(step: int, size: int = 300) -> dict:
    """A state with the structure of a real one: averages by decay, integer keys, scalars."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 3)
    params, *averages = ({"w": jax.random.normal(key, (size,)), "b": {0: jnp.ones(3)}} for key in keys)
    ema = {str(decay): average for decay, average in zip((0.9, 0.99), averages, strict=True)}
    return {
        "step": jnp.int32(step),
        "params": params,
        "ema": ema,
        "opt_state": ({"count": jnp.int32(step)}, ()),
    }


def abstract(state: dict) -> dict:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def save(
    workdir: Path, *steps: int, size: int = 300, settings: config.CheckpointConfig = SETTINGS.checkpoint
) -> None:
    with contextlib.closing(Checkpoints(workdir, settings)) as checkpoints:
        for step in steps:
            checkpoints.save(
                step, make_state(step, size), {"examples": 16 * step, **IMAGES.to_dict()}, SETTINGS
            )
        checkpoints.wait()


def restore(workdir: Path, size: int = 300):
    with contextlib.closing(Checkpoints(workdir, SETTINGS.checkpoint)) as checkpoints:
        return checkpoints.restore(abstract(make_state(0, size)))


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints 1 and 2, which tests must not change."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "run")


def test_a_state_survives_a_save_and_restore(saved):
    state, data = restore(saved)
    assert_equal(state, make_state(2))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    assert data == {"examples": 32, **IMAGES.to_dict()}
    assert read_config(saved) == SETTINGS


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    assert not has_checkpoints(tmp_path)
    assert restore(tmp_path) is None
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(("ema", "pick"), [(None, "0.9"), ("", "0.9"), ("0.99", "0.99"), ("params", None)])
def test_parameters_are_read_by_the_name_of_their_average(saved, ema, pick):
    components, step, params = read_checkpoint(saved, ema)
    state = make_state(2)
    assert (components.config, components.image_spec, step) == (SETTINGS, IMAGES, 2)
    assert_equal(params, state["ema"][pick] if pick else state["params"])


def test_one_checkpoint_directory_can_be_read(saved):
    _, step, params = read_checkpoint(saved / "checkpoints" / "1", "params")
    assert step == 1
    assert_equal(params, make_state(1)["params"])


def test_a_checkpoint_that_some_process_cannot_see_is_an_error(saved, monkeypatch):
    monkeypatch.setattr(reader, "processes_without", lambda here: [1, 3] if here else [])
    with pytest.raises(CheckpointError, match="process 1, 3 cannot see .*checkpoints/2, which process 0"):
        read_checkpoint(saved)


def test_a_missing_average_is_an_error(saved):
    with pytest.raises(CheckpointError, match=r"unknown average '0.5' in .*; expected 0.9, 0.99 or params"):
        read_checkpoint(saved, "0.5")


def test_checkpoints_move_between_meshes(tmp_path):
    size = 4 * 32
    mesh = make_mesh(config.MeshConfig(data=4, fsdp=1, tensor=1, context=1, cpu_devices=1), 4)
    layouts = {"split": batch_sharding(mesh), "replicated": replicated(mesh)}
    with contextlib.closing(Checkpoints(tmp_path, SETTINGS.checkpoint)) as checkpoints:
        state = make_state(1, size)
        state["params"]["w"] = jax.device_put(state["params"]["w"], layouts["split"])
        checkpoints.save(1, state, {}, SETTINGS)
        checkpoints.wait()
    _, _, params = read_checkpoint(tmp_path, "params")
    assert params["w"].sharding.device_set == {jax.devices()[0]}
    assert_equal(params, make_state(1, size)["params"])

    target = abstract(make_state(1, size))
    target["params"]["w"] = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=layouts["replicated"])
    with contextlib.closing(Checkpoints(tmp_path, SETTINGS.checkpoint)) as checkpoints:
        restored, _ = checkpoints.restore(target)
    assert restored["params"]["w"].sharding.is_equivalent_to(layouts["replicated"], 1)
    assert_equal(restored, make_state(1, size))


RETENTION = config.CheckpointConfig(
    every_steps=1, every_minutes=None, keep=1, keep_best=0, keep_every_steps=None
)


def test_old_checkpoints_are_deleted_as_the_config_says(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, settings=dataclasses.replace(RETENTION, keep=2, keep_every_steps=3))
    assert names(tmp_path) == ["3", "4", "5"]


def test_the_checkpoint_with_the_lowest_heldout_loss_is_kept_also_by_a_resumed_run(tmp_path):
    for losses in ({1: 0.5, 2: 0.2, 3: float("nan"), 4: None}, {5: 0.3}):
        with contextlib.closing(Checkpoints(tmp_path, dataclasses.replace(RETENTION, keep_best=1))) as run:
            for step, loss in losses.items():
                run.save(step, make_state(step), {}, SETTINGS, heldout_loss=loss)
            run.wait()
        assert names(tmp_path) == ["2", str(step)]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("corrupt", [flip, truncate, Path.unlink])
def test_corruption_of_any_file_is_detected(workdir, corrupt, caplog):
    directory = workdir / "checkpoints" / "2"
    items = [path for path in directory.rglob("*") if path.is_file() and path.parent != directory]
    for path in [directory / "SHA256SUMS", *items]:
        content = path.read_bytes()
        corrupt(path)
        with pytest.raises(CheckpointError, match=f"all checkpoints in {directory.parent} are corrupt: 2"):
            read_config(directory)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert read_config(directory) == SETTINGS


def test_a_record_cut_off_at_the_end_of_a_line_is_detected(workdir):
    record = workdir / "checkpoints" / "2" / "SHA256SUMS"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(CheckpointError, match="are corrupt: 2"):
        read_config(record.parent)


STRAYS = ["state/.DS_Store", "state/d/.nfs0000001", "config/._metadata", "state/notes.txt", "data/.x/y"]


def test_files_that_came_later_do_not_matter_and_are_named_unless_they_are_hidden(workdir, caplog):
    directory = workdir / "checkpoints" / "2"
    for name in STRAYS:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("later")
    state, _ = restore(workdir)
    assert_equal(state, make_state(2))
    [warning] = caplog.messages
    assert warning == f"ignoring 1 files in {directory} that came later, such as state/notes.txt"
    save(workdir, 3)
    assert names(workdir) == ["1", "2", "3"]


def test_hidden_files_that_come_during_a_save_may_disappear(tmp_path, monkeypatch):
    def with_strays(directory, **options):
        (directory / "state" / ".nfs0000001").write_text("open")
        write_record(directory, **options)
        (directory / "state" / ".nfs0000001").unlink()

    monkeypatch.setattr(manager, "write_record", with_strays)
    save(tmp_path, 1)
    assert_equal(restore(tmp_path)[0], make_state(1))


def test_without_checksums_only_sizes_are_compared(tmp_path, caplog):
    save(tmp_path, 1, settings=dataclasses.replace(SETTINGS.checkpoint, checksums=False))
    save(tmp_path, 2)
    directory = tmp_path / "checkpoints" / "1"
    assert (directory / "SIZES").exists() and not (directory / "SHA256SUMS").exists()
    path = max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(path)
    read_config(directory)
    truncate(path)
    with pytest.raises(CheckpointError, match="are corrupt: 1"):
        read_config(directory)
    assert restore(tmp_path)[1] == {"examples": 32, **IMAGES.to_dict()}


def test_each_process_checks_its_share_of_the_files(workdir):
    directory = workdir / "checkpoints" / "2"
    path = max(directory.rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(path)
    found = [find_corruption(directory, index=index, count=3) for index in range(3)]
    assert sorted(map(str, found)) == ["None", "None", f"changed file: {path.relative_to(directory)}"]


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/2/state", "checkpoints/2/SHA256SUMS"])
def test_checkpoints_that_may_not_be_read_are_an_error_and_nothing_changes(saved, name):
    copied = Path(tempfile.mkdtemp())
    copied.chmod(0o777)
    shutil.copytree(saved / "checkpoints", copied / "checkpoints")
    place = copied / name
    place.chmod(0)
    with not_root():
        for read in (read_config, read_checkpoint, restore):
            with pytest.raises(CheckpointError, match="cannot read .*Permission denied") as caught:
                read(copied)
            assert "\n" not in str(caught.value)
        if name == "checkpoints":
            with pytest.raises(CheckpointError, match=f"cannot read the checkpoints in {copied}"):
                has_checkpoints(copied)
    place.chmod(0o755)
    assert names(copied) == ["1", "2"]
    shutil.rmtree(copied)


def test_a_checkpoint_that_is_a_link_is_read_and_never_deleted(workdir, tmp_path):
    archived = tmp_path / "archive" / "1"
    shutil.move(workdir / "checkpoints" / "1", archived)
    (workdir / "checkpoints" / "1").symlink_to(archived)
    before = files(archived)
    save(workdir, 3, 4, 5, settings=RETENTION)
    assert names(workdir) == ["1", "5"]
    assert files(archived) == before
    shutil.rmtree(workdir / "checkpoints" / "5")
    assert_equal(restore(workdir)[0], make_state(1))


def test_a_save_whose_files_cannot_be_opened_is_an_error(tmp_path, monkeypatch):
    async def skip(*arguments, **options):
        """Orbax skips the merge, and logs it, if it finds no files to merge."""

    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", skip)
    message = r"checkpoint 1 could not be written to .* could not be opened: NOT_FOUND"
    with pytest.raises(CheckpointError, match=message), Checkpoints(tmp_path, SETTINGS.checkpoint) as run:
        run.save(1, {"w": jnp.ones(3)}, {}, SETTINGS)
    assert not has_checkpoints(tmp_path)


def test_a_corrupt_checkpoint_is_skipped_and_renamed_by_the_next_save(workdir, caplog):
    newest = workdir / "checkpoints" / "2"
    flip(max(newest.rglob("d/*"), key=lambda path: path.stat().st_size))
    corrupt = files(newest)
    with contextlib.closing(Checkpoints(workdir, SETTINGS.checkpoint)) as checkpoints:
        state, data = checkpoints.restore(abstract(make_state(0)))
        assert_equal(state, make_state(1))
        assert data["examples"] == 16
        assert "checkpoint" in caplog.text and "2 is corrupt (changed file: state/" in caplog.text
        assert "falling back to 1" in caplog.text
        assert names(workdir) == ["1", "2"]  # renamed only by the next save
        checkpoints.save(2, make_state(2), {"examples": 32}, SETTINGS)
    assert names(workdir) == ["1", "2", "2.unreadable"]
    assert files(workdir / "checkpoints" / "2.unreadable") == corrupt
    assert_equal(restore(workdir)[0], make_state(2))


def test_a_second_corrupt_checkpoint_of_a_step_is_also_kept(workdir):
    for _ in range(2):
        shutil.rmtree(workdir / "checkpoints" / "2" / "state")
        with contextlib.closing(Checkpoints(workdir, SETTINGS.checkpoint)) as checkpoints:
            checkpoints.restore(abstract(make_state(0)))
            checkpoints.save(2, make_state(2), {}, SETTINGS)
    assert names(workdir) == ["1", "2", "2.unreadable", "2.unreadable.1"]


def test_reading_parameters_falls_back_and_changes_no_file(workdir, caplog):
    (workdir / "checkpoints" / "2" / "state" / "_METADATA").unlink()
    before = files(workdir)
    _, step, params = read_checkpoint(workdir, "params")
    assert step == 1
    assert_equal(params, make_state(1)["params"])
    assert "falling back to 1" in caplog.text
    assert files(workdir) == before


def test_corrupt_checkpoints_keep_their_names_if_all_are_corrupt(workdir, caplog):
    for step in ("1", "2"):
        flip(workdir / "checkpoints" / step / "config" / "metadata")
    before = files(workdir)
    for read in (restore, read_checkpoint, read_config):
        with pytest.raises(CheckpointError, match="all checkpoints in .* are corrupt: 2, 1"):
            read(workdir)
    assert "there is no older checkpoint" in caplog.text
    assert files(workdir) == before


def test_an_intact_checkpoint_that_does_not_fit_is_not_reported_as_corrupt(workdir, caplog):
    state, more = abstract(make_state(0)), {"more": jax.ShapeDtypeStruct((), jnp.int32)}
    checkpoints = Checkpoints(workdir, SETTINGS.checkpoint)
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is intact but could not be restored: .*"):
        checkpoints.restore(state | {"params": more})
    message = rf"checkpoints/2 has no more, .* --config.init_from={workdir}$"
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(state | more)
    assert not caplog.text
    assert names(workdir) == ["1", "2"]


def test_a_checkpoint_of_a_different_version_is_not_reported_as_corrupt(workdir, monkeypatch):
    monkeypatch.setattr(config, "from_dict", lambda settings: config.check_field("config", "old", ["new"]))
    with pytest.raises(
        CheckpointError, match="checkpoints/2 was written by a different version: unknown field config.old"
    ):
        read_config(workdir)


def test_the_remains_of_a_killed_save_are_ignored_and_removed_by_the_next_save(workdir):
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "3.orbax-checkpoint-tmp")
    (checkpoints / "3.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    assert restore(workdir)[1]["examples"] == 32
    save(workdir, 3)
    assert names(workdir) == ["1", "2", "3"]
    assert_equal(restore(workdir)[0], make_state(3))


@contextlib.contextmanager
def full_disk(limit: int):
    """Simulate a full disk: no file can grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# After Orbax has raised, other writes of TensorStore still fail in the background.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_raises_one_line_and_keeps_the_last_good_checkpoint(tmp_path):
    size = 10**6
    save(tmp_path, 1, size=size)
    with full_disk(10**6), contextlib.closing(Checkpoints(tmp_path, SETTINGS.checkpoint)) as checkpoints:
        checkpoints.save(2, make_state(2, size), {}, SETTINGS)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(3, make_state(3, size), {}, SETTINGS)
    message = str(caught.value)
    assert message.startswith(f"checkpoint 2 could not be written to {tmp_path}/checkpoints: ")
    assert message.endswith("; older checkpoints are unchanged") and "\n" not in message
    assert_equal(restore(tmp_path, size)[0], make_state(1, size))
    save(tmp_path, 2, size=size)
    assert names(tmp_path) == ["1", "2"]


def test_a_directory_that_cannot_be_created_raises_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(
        CheckpointError, match=f"checkpoint 1 could not be written to {tmp_path}/checkpoints: "
    ):
        save(tmp_path, 1)


def test_a_directory_without_write_permission_raises_one_line(saved):
    directory = Path(tempfile.mkdtemp())
    shutil.copytree(saved / "checkpoints", directory / "checkpoints")
    for path in (directory, directory / "checkpoints"):
        path.chmod(0o555)
    before = names(directory)
    with not_root(), pytest.raises(CheckpointError, match="checkpoint 3 could not be written to .* denied"):
        save(directory, 3)
    assert names(directory) == before
    for path in (directory, directory / "checkpoints"):
        path.chmod(0o755)
    shutil.rmtree(directory)


def test_a_checkpoint_holds_its_own_step_although_its_memory_is_donated_to_the_next(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    mesh = make_mesh(config.MeshConfig(data=-1, fsdp=1, tensor=1, context=1, cpu_devices=1), 4)
    state = {"params": jax.device_put(jnp.zeros((1000, 1000)), replicated(mesh))}
    with contextlib.closing(Checkpoints(tmp_path, dataclasses.replace(RETENTION, keep=10))) as checkpoints:
        for step in range(1, 5):
            state = update(state)
            checkpoints.save(step, state, {}, SETTINGS)
            for _ in range(10):  # while the save runs
                state = update(state)
    for step in range(1, 5):
        with ocp.StandardCheckpointer() as reader:
            saved = reader.restore(tmp_path / "checkpoints" / str(step) / "state")
        np.testing.assert_array_equal(saved["params"], 11 * step - 10)
