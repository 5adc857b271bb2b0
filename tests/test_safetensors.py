"""The strict safetensors reader, and every reader of such files through it."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_autoencoder_weights import WEIGHTS, tiny_arrays
from test_autoencoder_weights import write as write_autoencoder
from upstream_files import state_dict

from dig_jax import autoencoder
from dig_jax.checkpoints.parameter_file import write_parameter_file
from dig_jax.checkpoints.reader import read_model
from dig_jax.convert.sources import open_upstream
from dig_jax.errors import CheckpointError
from dig_jax.files.safetensors import MAX_HEADER, open_safetensors, write_safetensors
from dig_jax.testing import random_params, tiny_components


def read_upstream(path):
    with open_upstream(path):
        pass


def autoencoder_file(folder):
    return write_autoencoder(folder, tiny_arrays()) / WEIGHTS


def upstream_file(folder):
    save_file(state_dict("dit"), folder / "dit.safetensors")
    return folder / "dit.safetensors"


def exported_file(folder):
    components = tiny_components()
    write_parameter_file(folder / "ours.safetensors", components, 7, random_params(components))
    return folder / "ours.safetensors"


USERS = {
    "autoencoder": (autoencoder_file, autoencoder.load),
    "convert": (upstream_file, read_upstream),
    "exported": (exported_file, read_model),
}


@pytest.fixture(scope="module", params=USERS)
def user(request, tmp_path_factory):
    """(file, its bytes, function that reads it)."""
    make, read = USERS[request.param]
    path = make(tmp_path_factory.mktemp(request.param))
    return path, path.read_bytes(), read


def split(content):
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header, data=b"", size=None):
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def with_entries(change):
    """Change the header: `change` gets the entries of two arrays that are adjacent in the file."""

    def damage(content):
        header, data = split(content)
        arrays = sorted(
            (entry for name, entry in header.items() if name != "__metadata__"),
            key=lambda entry: entry["data_offsets"],
        )
        change(arrays[0], arrays[1])
        return with_header(json.dumps(header).encode(), data)

    return damage


def without_first(content):
    header, data = split(content)
    del header[next(name for name in header if name != "__metadata__")]
    return with_header(json.dumps(header).encode(), data)


def one_name_twice(content):
    header, data = split(content)
    first, second = [name for name in header if name != "__metadata__"][:2]
    text = json.dumps(header)
    return with_header(text.replace(f'"{second}":', f'"{first}":').encode(), data)


def shift(first, second):
    """Let the second array begin in the first."""
    begin, end = second["data_offsets"]
    second["data_offsets"] = [begin - 4, end - 4]


# Damage and its error message; "" if the library words it.
DAMAGES = {
    "empty": (lambda content: b"", ""),
    "text": (
        lambda content: b"<!DOCTYPE html><title>404</title>",
        "a web page, not the file; download it again",
    ),
    "half": (lambda content: content[: len(content) // 2], ""),
    "cut off in the header": (lambda content: content[:100], ""),
    "a byte short": (lambda content: content[:-1], ""),
    "a byte more": (lambda content: content + b"\0", ""),
    "a header of an exabyte": (
        lambda content: with_header(b"{}", size=2**60),
        "header too large: got 1,152,921,",
    ),
    "a header too large": (
        lambda content: with_header(b" " * (MAX_HEADER + 1)),
        "header too large: got 8,388,609",
    ),
    "a header that is no JSON": (lambda content: with_header(b"{" * 100), ""),
    "a header that is a list": (lambda content: with_header(b"[]"), ""),
    "deep nesting": (lambda content: with_header(b'{"a":' * 10**5), ""),
    "offsets beyond the file": (with_entries(lambda a, b: a["data_offsets"].__setitem__(1, 2**60)), ""),
    "offsets beyond 64 bits": (with_entries(lambda a, b: a["data_offsets"].__setitem__(1, 2**70)), ""),
    "negative offsets": (with_entries(lambda a, b: a.update(data_offsets=[-4, 0])), ""),
    "offsets backwards": (with_entries(lambda a, b: a["data_offsets"].reverse()), ""),
    "the same bytes twice": (with_entries(lambda a, b: b.update(data_offsets=a["data_offsets"])), ""),
    "overlapping": (with_entries(shift), ""),
    "a hole": (without_first, ""),
    "negative shape": (with_entries(lambda a, b: a.update(shape=[-1])), ""),
    "shape beyond its data": (with_entries(lambda a, b: a.update(shape=[10**9])), ""),
    "shape beyond 64 bits": (with_entries(lambda a, b: a.update(shape=[2**40, 2**40])), ""),
    "an unknown dtype": (with_entries(lambda a, b: a.update(dtype="Q7")), ""),
    "another dtype's size": (with_entries(lambda a, b: a.update(dtype="F64")), ""),
    "one name twice": (one_name_twice, "duplicate name .* in the header"),
}


def assert_rejected(path, damage, read):
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"invalid safetensors file: .*{message}") as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_invalid_file_is_rejected_in_one_line(tmp_path, damage):
    def read(path):
        with open_safetensors(path):
            pass

    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros((3, 4), np.float32), "b": np.ones(5, np.float32)}, {"c": "d"})
    read(path)
    assert_rejected(path, damage, read)


@pytest.mark.parametrize("damage", ["half", "a header of an exabyte", "overlapping", "one name twice"])
def test_every_reader_rejects_an_invalid_file(user, damage):
    path, content, read = user
    path.write_bytes(content)
    assert_rejected(path, damage, read)


def test_valid_files_are_read(user):
    path, content, read = user
    path.write_bytes(content)
    read(path)


def test_arrays_are_described_before_they_are_read_and_come_back_unchanged(tmp_path):
    arrays = {"half": np.arange(6, dtype=np.float16).reshape(2, 3), "count": np.arange(3)}
    write_safetensors(tmp_path / "x.safetensors", arrays, {"format": "pt"})
    with open_safetensors(tmp_path / "x.safetensors") as file:
        assert dict(file.metadata) == {"format": "pt"}
        assert {name: (x.shape, x.dtype) for name, x in file.arrays.items()} == {
            "half": ((2, 3), "float16"),
            "count": ((3,), "int64"),
        }
        for name, array in file.arrays.items():
            np.testing.assert_array_equal(array.read(), arrays[name])


def test_missing_or_unreadable_files_are_errors(tmp_path):
    with (
        pytest.raises(CheckpointError, match="x.safetensors: no such file"),
        open_safetensors(tmp_path / "x.safetensors"),
    ):
        pass
    (tmp_path / "folder.safetensors").mkdir()
    with (
        pytest.raises(CheckpointError, match="folder.safetensors: cannot read the file: Is a directory"),
        open_safetensors(tmp_path / "folder.safetensors"),
    ):
        pass


def test_a_file_is_replaced_atomically_with_the_usual_permissions(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("what was there")
    before = os.umask(0o027)
    try:
        with pytest.raises(OSError, match="dtype|object|U1"):
            write_safetensors(path, {"a": np.array(["text"])}, {})
        assert path.read_text() == "what was there"
        write_safetensors(path, {"a": np.ones(3)}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert load_file(path).keys() == {"a"}
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
