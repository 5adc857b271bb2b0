"""One strict reader of safetensors, and all who read such files through it."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_autoencoder_weights import WEIGHTS, tiny_arrays
from test_autoencoder_weights import write as write_autoencoder
from tiny_components import random_params, tiny_components
from upstream_files import state_dict

from dig_jax import autoencoder
from dig_jax.checkpoints.parameter_file import write_parameter_file
from dig_jax.checkpoints.reader import read_model
from dig_jax.convert.sources import open_upstream
from dig_jax.errors import CheckpointError
from dig_jax.files.safetensors import MAX_HEADER, open_safetensors, write_safetensors


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
    """(the user's file, its bytes, what reads it)."""
    make, read = USERS[request.param]
    path = make(tmp_path_factory.mktemp(request.param))
    return path, path.read_bytes(), read


def split(content):
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header, data=b"", size=None):
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def lying(change):
    """The file with another header: `change` gets those of two arrays that lie one behind the other."""

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
    """The second begins in the first, and has its length."""
    begin, end = second["data_offsets"]
    second["data_offsets"] = [begin - 4, end - 4]


# What is wrong, and what is told of it where that is not the library's own wording.
DAMAGES = {
    "empty": (lambda content: b"", ""),
    "text": (lambda content: b"<!DOCTYPE html><title>404</title>", "header too large: got"),
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
    "offsets beyond the file": (lying(lambda a, b: a["data_offsets"].__setitem__(1, 2**60)), ""),
    "offsets beyond 64 bits": (lying(lambda a, b: a["data_offsets"].__setitem__(1, 2**70)), ""),
    "negative offsets": (lying(lambda a, b: a.update(data_offsets=[-4, 0])), ""),
    "offsets backwards": (lying(lambda a, b: a["data_offsets"].reverse()), ""),
    "the same bytes twice": (lying(lambda a, b: b.update(data_offsets=a["data_offsets"])), ""),
    "overlapping": (lying(shift), ""),
    "a hole": (without_first, ""),
    "negative shape": (lying(lambda a, b: a.update(shape=[-1])), ""),
    "shape beyond its data": (lying(lambda a, b: a.update(shape=[10**9])), ""),
    "shape beyond 64 bits": (lying(lambda a, b: a.update(shape=[2**40, 2**40])), ""),
    "an unknown dtype": (lying(lambda a, b: a.update(dtype="Q7")), ""),
    "another dtype's size": (lying(lambda a, b: a.update(dtype="F64")), ""),
    "one name twice": (one_name_twice, "duplicate name .* in the header"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_lies_or_is_damaged_is_refused_in_one_line_by_all_who_read_such(user, damage):
    path, content, read = user
    change, message = DAMAGES[damage]
    path.write_bytes(change(content))
    expected = f"invalid safetensors file: .*{message}"
    with pytest.raises(CheckpointError, match=expected) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < len(str(path)) + 300


def test_the_undamaged_files_are_read(user):
    path, content, read = user
    path.write_bytes(content)
    read(path)


def test_arrays_are_known_before_they_are_read_and_come_back_as_they_were(tmp_path):
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


def test_what_is_not_there_or_not_to_be_read_is_told(tmp_path):
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


def test_a_file_is_replaced_whole_and_with_the_permissions_of_others(tmp_path):
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
