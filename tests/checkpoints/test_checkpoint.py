import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_states import (
    IMAGES,
    RETENTION,
    SETTINGS,
    abstract,
    assert_equal,
    files,
    make_state,
    names,
    not_root,
    restore,
    save,
)
from full_disk import full_disk
from orbax.checkpoint._src.serialization import ocdbt_utils

from dig_jax import config
from dig_jax.checkpoints import manager, reader
from dig_jax.checkpoints.integrity import write_record
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.reader import has_checkpoints, read_checkpoint, read_config
from dig_jax.errors import CheckpointError
from dig_jax.parallel import batch_sharding, make_mesh, replicated


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


def test_old_checkpoints_are_deleted_as_the_config_says(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, settings=dataclasses.replace(RETENTION, keep=2, keep_every_steps=3))
    assert names(tmp_path) == ["3", "4", "5"]


def test_the_checkpoint_with_the_lowest_heldout_loss_is_kept_also_by_a_resumed_run(tmp_path):
    for losses in ({1: 0.5, 2: 0.2, 3: float("nan"), 4: None}, {5: 0.3}):
        with contextlib.closing(Checkpoints(tmp_path, dataclasses.replace(RETENTION, keep_best=1))) as run:
            for step, loss in losses.items():
                run.save(step, make_state(step), {}, SETTINGS, metric=loss)
            run.wait()
        assert names(tmp_path) == ["2", str(step)]


def test_hidden_files_that_come_during_a_save_may_disappear(tmp_path, monkeypatch):
    def with_strays(directory, **options):
        (directory / "state" / ".nfs0000001").write_text("open")
        write_record(directory, **options)
        (directory / "state" / ".nfs0000001").unlink()

    monkeypatch.setattr(manager, "write_record", with_strays)
    save(tmp_path, 1)
    assert_equal(restore(tmp_path)[0], make_state(1))


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


def test_the_remains_of_a_killed_save_are_ignored_and_removed_by_the_next_save(workdir):
    checkpoints = workdir / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "3.orbax-checkpoint-tmp")
    (checkpoints / "3.orbax-checkpoint-tmp" / "commit_success.txt").unlink()
    assert restore(workdir)[1]["examples"] == 32
    save(workdir, 3)
    assert names(workdir) == ["1", "2", "3"]
    assert_equal(restore(workdir)[0], make_state(3))


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
