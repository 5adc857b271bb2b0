"""Small PyTorch files that describe huge objects by shared references are refused before these are built.

Without the bounds each of them takes minutes or gigabytes.
"""

import zipfile

import pytest
from torch_files import pickled, storage, tensor, text, tree, write

from dig_jax import CheckpointError
from dig_jax.files.pytorch.reader import open_torch

POP = b"0"


def get(index):
    return b"h" + bytes([index])


def put(index):
    return b"q" + bytes([index])


def shared(levels, keys):
    """Nested dicts; all entries of one are the same memoized dict."""
    pickle = b"}" + put(0)
    for level in range(levels):
        items = b"".join(text(str(key)) + get(level) for key in range(keys))
        pickle += b"}(" + items + b"u" + put(level + 1)
    return pickle


def nested_tuples(levels):
    """A tuple of two equal tuples of two equal tuples ..."""
    pickle = b")" + put(0)
    for level in range(levels):
        pickle += get(level) + b"\x86" + put(level + 1)
    return pickle


LONG = text("n" * 2**20)
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
NAMES, CLASS = "too many names: expected at most 100,000", "name of a class that is not text of at most 300"
BOMBS = {
    "names": (shared(4, 100), NAMES),
    "names_on_many_levels": (shared(7, 1000), NAMES),
    "ordered_dicts_of_one_list": (
        b"]("
        + b"".join(text(str(i)) + b"N\x86" for i in range(50_000))
        + b"e"
        + put(0)
        + b"ccollections\nOrderedDict\n"
        + put(1)
        + (get(1) + get(0) + b"\x85R" + POP) * 100_000,
        NAMES,
    ),
    "tensors_of_one_shape": (
        REBUILD
        + put(0)
        + storage()
        + put(1)
        + b"("
        + b"K\1" * 300_000
        + b"t"
        + put(2)
        + (get(0) + b"(" + get(1) + b"K\0" + get(2) + get(2) + b"tR" + POP) * 100_000,
        "too many dimensions: got 300000; expected at most 8",
    ),
    "classes_of_one_name": (
        LONG + put(0) + LONG + b"\x93" + put(1) + (get(1) + b")R" + POP) * 20_000,
        CLASS,
    ),
    "a_class_named_by_nested_tuples": (text("x") + nested_tuples(40) + b"\x93", CLASS),
    "one_long_key": (
        b"}" + put(0) + LONG + b"Ns0}(" + b"".join(text(str(i)) + get(0) for i in range(5_000)) + b"u",
        "invalid name ",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_that_describes_a_huge_object_gives_one_line(tmp_path, bomb):
    pickle, message = BOMBS[bomb]
    write(tmp_path / "x.pt", pickled(pickle), s0=bytes(24))
    with pytest.raises(CheckpointError) as caught, open_torch(tmp_path / "x.pt") as file:
        file.names()
        file.tensors()
    assert message in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 200


def test_a_long_name_of_a_storage_is_not_copied_for_each_use(tmp_path):
    storage_id = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + LONG + text("cpu") + b"K\6t" + put(0)
    write(tmp_path / "x.pt", pickled(storage_id + (get(0) + b"Q" + POP) * 20_000 + b"}"))
    with open_torch(tmp_path / "x.pt") as file:
        assert file.content == {}


def test_a_zip_bomb_is_rejected_by_its_directory(tmp_path):
    path = tmp_path / "x.pt"
    write(path, pickled(tree(w=tensor())), compression=zipfile.ZIP_DEFLATED, s0=bytes(10**8))
    assert path.stat().st_size < 10**6
    with pytest.raises(CheckpointError, match="compressed member 'x/.*'; expected"), open_torch(path) as file:
        file.tensors()
