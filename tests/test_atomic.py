import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dig_jax.files import atomic
from dig_jax.files.atomic import naming_file, new_folder, remove_leftovers, replacing, write_json


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "planted").symlink_to(victim)
    monkeypatch.setattr(atomic, "temporary_name", lambda path: tmp_path / "planted")
    with pytest.raises(FileExistsError), replacing(tmp_path / "x") as file:
        file.write(b"theirs")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("96 requested and 0 written")]
)
def test_a_full_disk_names_the_file(tmp_path, error):
    with pytest.raises(OSError) as caught, replacing(tmp_path / "x.json"):
        raise error
    assert str(tmp_path / "x.json") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_disk_names_the_file():
    path = Path("/dev/full")
    with (
        pytest.raises(OSError, match="No space left on device: '/dev/full'"),
        naming_file(path),
        path.open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "x"):
        (tmp_path / "other").read_bytes()


def test_a_folder_that_cannot_be_written_is_named_not_its_temporary_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "none" / "x"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "x")


_KILLED = """
import os, sys
from pathlib import Path
from dig_jax.files.atomic import new_folder, replacing
with replacing(Path(sys.argv[1], "x.npz")) as file, new_folder(Path(sys.argv[1], "folder")) as folder:
    (folder / "y").write_text("")
    file.write(b"x")
    os.kill(os.getpid(), 9)
"""


def test_the_temporary_files_of_killed_writers_are_removed_and_no_others(tmp_path):
    subprocess.run([sys.executable, "-c", _KILLED, tmp_path], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    others = [".nfs0000001", "._x", ".x.1234", "x.tmp", ".x.elsewhere.1.0123abcd.tmp"]
    for name in others:
        (tmp_path / name).write_text("")
    old = tmp_path / ".x.elsewhere.2.0123abcd.tmp"
    old.write_text("")
    os.utime(old, (time.time() - 7200,) * 2)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        alive = tmp_path / f".x.{atomic.socket.gethostname()}.{running.pid}.0123abcd.tmp"
        alive.write_text("")
        remove_leftovers(tmp_path)
        running.communicate(b"\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, alive.name])
    remove_leftovers(tmp_path / "none")


def test_names_that_are_not_utf8_survive_in_json(tmp_path):
    value = {"path": os.fsdecode(b"caf\xe9"), "class": "é"}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_bytes()) == value
    assert "é" in (tmp_path / "x.json").read_text("utf-8")


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with pytest.raises(ValueError), new_folder(tmp_path / "x") as folder:
        (folder / "y").write_text("")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "x") as folder:
        np.save(folder / "y", np.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
