"""Corrupt checkpoints: found, skipped, kept aside and never overwritten."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from checkpoint_states import (
    IMAGES,
    SETTINGS,
    abstract,
    assert_equal,
    files,
    flip,
    make_state,
    names,
    restore,
    save,
    truncate,
)

from dig_jax import config
from dig_jax.checkpoints.integrity import find_corruption
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.reader import read_checkpoint, read_config
from dig_jax.errors import CheckpointError


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
