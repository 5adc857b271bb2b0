"""One layer for the paths that people type: `~`, gs:// and s3://, and what is refused."""

import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_storage import bucket, directed, storage_servers  # noqa: F401 (fixtures)

from dig_jax.errors import ConfigError
from dig_jax.files import paths
from dig_jax.files.paths import to_path


def test_tilde_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert to_path("~/runs/x") == pathlib.Path("/somewhere/runs/x")
    assert to_path(pathlib.Path("~/runs")) == pathlib.Path("/somewhere/runs")
    with pytest.raises(ConfigError, match=r"~nobody-has-this-name"):
        to_path("~nobody-has-this-name/x")


@given(st.text(st.characters(exclude_characters="\0~:"), min_size=1))
def test_a_local_path_is_taken_as_it_is(text):
    assert to_path(text) == pathlib.Path(text)
    assert not paths.is_remote(to_path(text))


@pytest.mark.parametrize(
    "text",
    [
        "az://account/x",
        "http://host/x",
        "file:///tmp/x",
        "gs:/bucket/x",
        "gs://",
        "gs:///x",
        "s3:///",
        "GS://bucket/x",
        "gs://bucket/lr=[1e-4]",
        "s3://bucket/*",
        "gs://bucket/a#b",
        "a\0b",
    ],
)
def test_what_is_no_path_is_refused_in_one_line(text):
    with pytest.raises(ConfigError) as error:
        to_path(text)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gcsfs: pip install -e '.\[storage\]'"):
        to_path("gs://bucket/x")


@pytest.mark.parametrize("name", ["lr=[1e-4]", "a*", "b?", "c\\d", "gs:"])
def test_a_folder_that_orbax_takes_for_a_pattern_is_refused(tmp_path, monkeypatch, name):
    with pytest.raises(ConfigError, match="invalid --workdir"):
        paths.check_plain(tmp_path / name / "x", "--workdir")
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)  # a relative path has the characters of the current directory
    with pytest.raises(ConfigError, match="invalid --workdir"):
        paths.check_plain(to_path("x"), "--workdir")


def test_a_folder_that_is_not_utf_8_is_refused(tmp_path):
    name = os.fsdecode(b"w\xe9rk")
    with pytest.raises(ConfigError, match="invalid --workdir: got .*; expected a name in UTF-8"):
        paths.check_plain(tmp_path / name, "--workdir")
    with pytest.raises(ConfigError, match="invalid --output: got .*; expected a name in UTF-8"):
        paths.check_utf8(to_path(name), "--output")


@pytest.mark.parametrize("name", ["a b", "ä#%=,@+~", "logs:x", "{}()'\"", "s3:"])
def test_other_folders_are_accepted(tmp_path, name):
    paths.check_plain(tmp_path / name, "--workdir")


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path, bucket):  # noqa: F811
    return to_path(tmp_path / "folder" if request.param == "local" else f"{bucket}/folder")


def test_files_in_object_storage_behave_as_local_ones_do(folder):
    paths.make_folder(folder / "sub")
    (folder / "b.txt").write_bytes(b"bb")
    (folder / "sub" / "a.txt").write_bytes(b"a")
    assert [path.name for path in paths.children(folder)] == ["b.txt", "sub"]
    assert paths.children(folder / "missing") == []
    assert (folder / "sub").is_dir()
    assert (folder / "b.txt").exists()
    assert paths.size(folder / "b.txt") == 2
    with paths.local_copy(folder / "b.txt") as copy:
        assert copy.read_bytes() == b"bb"
    paths.rename(folder / "sub", folder / "other")
    assert (folder / "other" / "a.txt").read_bytes() == b"a"
    assert not (folder / "sub").exists()
    (folder / "b.txt").write_bytes(b"new")  # a listing or a size must not come from a cache
    assert paths.size(folder / "b.txt") == 3
    paths.delete(folder / "b.txt")
    paths.delete(folder / "b.txt")
    assert [path.name for path in paths.children(folder)] == ["other"]
    paths.delete(folder)
    assert not folder.exists()


def test_a_file_is_created_by_one_process_only(folder):
    paths.make_folder(folder)
    assert paths.create_exclusively(folder / "lock", b"first")
    assert not paths.create_exclusively(folder / "lock", b"second")
    assert (folder / "lock").read_bytes() == b"first"


def test_a_local_file_is_copied_to_object_storage(bucket, tmp_path):  # noqa: F811
    (tmp_path / "x").write_bytes(b"content")
    paths.upload(tmp_path / "x", to_path(f"{bucket}/deep/x"))
    assert to_path(f"{bucket}/deep/x").read_bytes() == b"content"


def test_absolute_keeps_the_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.absolute(to_path("x")) == tmp_path / "x"
    assert str(paths.absolute(to_path("gs://bucket/x"))) == "gs://bucket/x"
