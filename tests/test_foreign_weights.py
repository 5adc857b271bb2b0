"""Weights in files of PyTorch before 1.6 and in pickles of arrays are read as data, without running code."""

import os
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from torch_files import number, pickled, tensor, text, tree, write_legacy

from dig_jax import CheckpointError
from dig_jax.files.weights import open_weights

SIX = np.arange(6, dtype="<f4").tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights"


def read(path):
    with open_weights(path) as weights:
        return {name: array.read() for name, array in weights.below("").items()}


def error_line(path):
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_tensors_of_a_legacy_file_are_read_from_their_storages(path):
    content = tree(w=tensor(key="5"), turned=tensor(key="5", strides=(1, 2)), half=tensor(kind="HalfStorage"))
    write_legacy(path, content, s0=(6, np.arange(6, dtype="<f2").tobytes()), s5=(6, SIX))
    result = read(path)
    assert list(result) == ["w", "turned", "half"]
    np.testing.assert_array_equal(result["w"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(result["turned"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(result["half"], [[0, 1, 2], [3, 4, 5]])
    assert result["half"].dtype == np.float16


LEGACY = {
    "truncated": ({"s0": (6, SIX[:-1])}, "truncated file: storage 0 extends beyond the end"),
    "another_count": ({"s0": (7, SIX)}, "storage 0 has 7 values; expected 6"),
    "a_storage_of_no_tensor": ({"keys": ["1"]}, "storage 1 belongs to no tensor"),
    "missing": ({"keys": []}, "missing storage 0"),
    "keys_of_another_type": ({"keys": [], "content": None}, "expected a list of storages"),
    "another_version": ({"version": 1002}, "got version 1002; expected 1001"),
    "big_endian": ({"system": b"}(" + text("little_endian") + b"\x89u"}, "not written on a little-endian"),
    "two_sizes": (
        {"content": tree(w=tensor(), v=tensor(numel=7), u=number(1))},
        "corrupt pickle: two sizes of storage 0",
    ),
    "a_negative_size": ({"content": tree(w=tensor(numel=-6))}, "storage 0 of -6 values"),
}


@pytest.mark.parametrize("damage", LEGACY)
def test_a_corrupt_legacy_file_gives_one_line(path, damage):
    changes, message = LEGACY[damage]
    changes = {"content": tree(w=tensor()), "s0": (6, SIX)} | changes
    if changes["content"] is None:  # a number in place of the list
        write_legacy(path, tree(w=tensor()))
        path.write_bytes(path.read_bytes().removesuffix(pickled(b"](e")) + pickled(number(1)))
    else:
        write_legacy(path, **changes)
    assert message in error_line(path)


@pytest.mark.parametrize("size", [15, 20, 60, 150, 250])
def test_a_legacy_file_cut_anywhere_gives_one_line(path, size):
    write_legacy(path, tree(w=tensor()), s0=(6, SIX))
    path.write_bytes(path.read_bytes()[:size])
    assert "truncated or corrupt file: no complete pickle" in error_line(path)


def test_pytorch_s_own_legacy_files_are_read(path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    stored = {"a": base, "turned": base.T, "part": base[1:, ::2], "p": torch.nn.Parameter(base.bfloat16())}
    torch.save(stored, path, _use_new_zipfile_serialization=False)
    found = read(path)
    assert found.keys() == stored.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.astype(np.float32), stored[name].detach().float().numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_nested_dicts_of_arrays_are_read_from_a_pickle(path, protocol, convert):
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "halves": np.arange(3, dtype=np.float16),
        "scalar": np.float32(7).reshape(()),
    }
    content = {"note": "text", "layer": {name: convert(array) for name, array in arrays.items()}}
    path.write_bytes(pickle.dumps(content, protocol))
    result = read(path)
    assert set(result) == {f"layer.{name}" for name in arrays}
    for name, array in arrays.items():
        np.testing.assert_array_equal(result[f"layer.{name}"], array)
        assert result[f"layer.{name}"].dtype == array.dtype


def test_bytes_of_the_other_byte_order_are_swapped(path):
    path.write_bytes(pickle.dumps({"x": np.arange(3, dtype=">f4")}))
    np.testing.assert_array_equal(read(path)["x"], [0, 1, 2])


class Call:
    """An object that runs code when Python unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


PICKLES = {
    "a_list": ([1, 2], "invalid pickle: got list; expected nested dicts of arrays"),
    "objects": ({"x": np.asarray([{}], object)}, "corrupt pickle: invalid state of an array"),
    "dates": ({"x": np.zeros(2, "M8[s]")}, "unsupported dtype 'M8' in a pickle; expected numbers"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_another_pickle_gives_one_line(path, kind):
    content, message = PICKLES[kind]
    path.write_bytes(pickle.dumps(content, 4))
    assert message in error_line(path)


def test_a_pickled_array_of_another_size_gives_one_line(path):
    data = pickle.dumps({"x": np.arange(6, dtype=np.float32)}, 2)
    assert data.count(b"K\x06\x85") == 1  # its shape
    path.write_bytes(data.replace(b"K\x06\x85", b"K\x07\x85"))
    assert "corrupt pickle: array of shape (7,) with 24 bytes" in error_line(path)


def test_reading_a_pickle_calls_nothing(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path.write_bytes(pickle.dumps({"x": Call(), "y": np.zeros(2)}))
    assert list(read(path)) == ["y"]
    assert not os.path.exists("made_by_a_pickle")
