"""PyTorch files are read as data; hostile content gives one line and does nothing."""

import math
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import torch_files as made
from torch_files import namespace, number, parameter, pickled, tensor, text, tree, write

from dig_jax import CheckpointError
from dig_jax.files.pytorch.reader import open_torch
from dig_jax.files.pytorch.writer import write_torch

SIX = np.arange(6, dtype="<f4").tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.pt"


def read(path, name="", values=True):
    with open_torch(path) as file:
        return {key: file.read(x) if values else x for key, x in file.tensors(name).items()}


def error_line(path, name=""):
    """The error line of reading."""
    with pytest.raises(CheckpointError) as caught:
        read(path, name)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_written_arrays_are_read_bit_for_bit(path):
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3, 4), "b.weight": (5,), "scalar": (), "one": (1, 1)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays["turned"] = arrays["a"].T
    arrays["again"] = arrays["a"]
    write_torch(path, arrays)
    result = read(path)
    assert list(result) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(result[name], array)
        assert result[name].dtype == np.float32
    with zipfile.ZipFile(path) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 5  # the alias is not a copy


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", jnp.bfloat16),
        ("DoubleStorage", np.float64),
        ("LongStorage", np.int64),
        ("BoolStorage", np.bool_),
    ],
)
@pytest.mark.parametrize("order", ["little", "big"])
def test_storages_of_all_dtypes_and_byte_orders_are_read(path, kind, dtype, order):
    values = np.array([0, 1, 0, 1, 1, 0]).astype(dtype)
    size = values.dtype.itemsize
    data = values.view(f"u{size}").astype(f"{'<' if order == 'little' else '>'}u{size}").tobytes()
    write(path, pickled(tree(x=tensor(kind=kind))), order=order.encode(), s0=data)
    result = read(path)["x"]
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, values.reshape(2, 3))


def test_offsets_strides_and_shared_storages_are_followed(path):
    views = {
        "whole": tensor(),
        "turned": tensor(shape=(3, 2), strides=(1, 3)),
        "columns": tensor(offset=1, shape=(2, 2), strides=(3, 1)),
        "last": parameter(offset=5, shape=(), strides=()),
        "thin": tensor(shape=(6, 1), strides=(1, 2**60)),
    }
    write(path, pickled(tree(**views)), order=None, s0=SIX)
    result, whole = read(path), np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(result["whole"], whole)
    np.testing.assert_array_equal(result["turned"], whole.T)
    np.testing.assert_array_equal(result["columns"], whole[:, 1:])
    np.testing.assert_array_equal(result["last"], 5.0)
    np.testing.assert_array_equal(result["thin"], whole.reshape(6, 1))


def test_only_the_selected_tree_must_be_valid(path):
    content = tree(
        model=tree(w=tensor()),
        ema=tree(w=tensor(key="1")),
        opt=tree(state=tree(a=tensor()), param_groups=b"]"),
        args=namespace(model="DiG-S/2"),
    )
    write(path, pickled(content), s0=SIX, s1=SIX)
    damaged = path.read_bytes().replace(SIX, b"\1" * len(SIX), 1)
    path.write_bytes(damaged)
    np.testing.assert_array_equal(read(path, "ema")["w"], np.arange(6.0).reshape(2, 3))
    assert list(read(path, "opt.state", values=False)) == ["a"]
    with open_torch(path) as file:
        assert file.content["args"].state == {"model": "DiG-S/2"}
    assert "corrupt member x/data/0: checksum mismatch" in error_line(path, "model")
    assert "invalid opt.param_groups: got list" in error_line(path, "opt")
    assert "unknown tree 'emma'; expected one of: model, ema, opt, args" in error_line(path, "emma")
    assert "invalid args: got argparse.Namespace; expected a tree" in error_line(path, "args")


class Call:
    """A pickle of it calls os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_with_a_call_does_nothing_and_the_error_names_it(path, tmp_path, protocol):
    marker = tmp_path / "executed"
    write(path, pickle.dumps({"model": {"w": Call(marker)}}, protocol))
    assert f"invalid model.w: got {os.name}.mkdir" in error_line(path, "model")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Call(marker), protocol))
    assert marker.exists()  # what an unpickler that calls would have done


@pytest.mark.parametrize(
    "gadget",
    [
        b"cbuiltins\neval\n" + text("1/0") + b"\x85R",
        b"cos\nsystem\n" + text("true") + b"\x85R}b",
        b"cbuiltins\n__import__\n" + text("antigravity") + b"\x85R",
        text("os") + text("system") + b"\x93" + text("true") + b"\x85R",
        b"cos\nno_such_thing\n)\x81}(" + text("__class__") + text("x") + b"ub",
    ],
)
def test_names_in_a_pickle_are_never_imported(path, gadget):
    write(path, pickled(tree(w=gadget)))
    assert "invalid w: got " in error_line(path)


def test_a_placeholder_accepts_items(path):
    strange = b"csome\nList\n)R(" + number(1) + b"e(" + number(1) + number(2) + b"u"
    write(path, pickled(tree(strange=strange, w=tensor(), n=b"N")), s0=SIX)
    with open_torch(path) as file:
        assert file.content["strange"].kind == "some.List"


NAN = b"G" + struct.pack(">d", math.nan)
CORRUPT_TENSORS = {
    "beyond_its_storage": (
        tensor(shape=(2, 4), strides=(3, 1)),
        "exceeds its storage: got index 6 of 6 values in storage 0",
    ),
    "offset_beyond": (tensor(offset=6, shape=(1,), strides=(1,)), "exceeds its storage: got index 6 of"),
    "offset_of_an_exabyte": (tensor(offset=2**60), "exceeds its storage: got index"),
    "strides_of_an_exabyte": (tensor(strides=(2**62, 1)), "exceeds its storage: got index"),
    "negative_offset": (tensor(offset=-1), "invalid offset, shape or strides"),
    "negative_strides": (tensor(offset=5, shape=(6,), strides=(-1,)), "invalid offset, shape or strides"),
    "negative_shape": (tensor(shape=(-2, -3)), "invalid offset, shape or strides"),
    "more_strides": (tensor(shape=(6,)), "invalid offset, shape or strides"),
    "huge_numbers": (tensor(shape=(2**100,), strides=(0,)), "invalid offset, shape or strides"),
    "repeated": (tensor(shape=(2**40,), strides=(0,)), "repeats values: its storage has only 6"),
    "nine_dimensions": (
        tensor(shape=(1,) * 9, strides=(1,) * 9),
        "too many dimensions: got 9; expected at most 8",
    ),
    "without_values": (
        tensor(shape=(0, 2**62), strides=(2**62, 1)),
        "invalid w: got tensor without values",
    ),
    "storage_lies": (tensor(numel=2**40), "has 24 bytes; expected 1,099,511,627,776 values of float32"),
    "storage_of_another_dtype": (tensor(kind="DoubleStorage"), "has 24 bytes; expected 6 values of float64"),
    "storage_outside": (tensor(key="../../etc/passwd"), "missing storage x/data/../../etc/passwd"),
    "storage_missing": (tensor(key="1"), "missing storage x/data/1"),
    "storage_unknown": (
        tensor(kind="UntypedStorage", module="torch.storage"),
        ": got unsupported tensor",
    ),
    "no_storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + number(1) + b"tR",
        "tensor without a storage",
    ),
    "no_tensor": (number(3), "invalid w: got int"),
    "not_a_number": (NAN, "invalid w: got float"),
    "numpy_scalar": (b"cnumpy.core.multiarray\nscalar\n)R", ": got numpy.core.multiarray.scalar"),
    "ordered_dict_of_numbers": (
        b"ccollections\nOrderedDict\n(" + number(1) + b"tR",
        "OrderedDict of something other than pairs",
    ),
}


@pytest.mark.parametrize("damage", CORRUPT_TENSORS)
def test_an_invalid_tensor_gives_one_line(path, damage):
    entry, message = CORRUPT_TENSORS[damage]
    write(path, pickled(tree(w=entry)), s0=SIX)
    assert message in error_line(path)


NESTED = 20_000
CORRUPT_PICKLES = {
    "empty": (b"", "pickle exhausted before seeing STOP"),
    "no_end": (b"\x80\x02}", "pickle exhausted before seeing STOP"),
    "text": (b"hello", "corrupt pickle: "),
    "cut_string": (pickled(text("model"))[:-4], "corrupt pickle: "),
    "string_of_an_exabyte": (b"\x80\x04\x8d" + struct.pack("<Q", 2**60), "corrupt pickle: "),
    "bytes_of_an_exabyte": (b"\x80\x04\x8e" + struct.pack("<Q", 2**60), "corrupt pickle: "),
    "bytearray_of_an_exabyte": (b"\x80\x05\x96" + struct.pack("<Q", 2**60), "corrupt pickle: "),
    "memo_of_gigabytes": (
        pickled(b"Nr\xff\xff\xff\xff"),
        "invalid content: got NoneType; expected a tree",
    ),
    "memo_that_is_not_there": (pickled(b"h\x05"), "missing stack or memo entry"),
    "stack_that_is_not_there": (pickled(b"su"), "missing stack or memo entry"),
    "mark_that_is_not_there": (pickled(b"}u"), "missing stack or memo entry"),
    "odd_items": (pickled(b"}(" + text("a") + b"u"), "corrupt pickle: "),
    "items_of_a_number": (
        pickled(number(1) + text("a") + text("b") + b"s"),
        "item set on an object of type int",
    ),
    "appended_to_a_number": (pickled(number(1) + number(1) + b"a"), "item appended to an object of type int"),
    "number_of_a_megabyte": (
        pickled(b"\x8b" + struct.pack("<i", 2**20) + b"\1" * 2**20),
        "got 8388601 bits; expected at most 128",
    ),
    "protocol": (b"\x80\x09}.", "unsupported pickle protocol: got 9; expected at most 5"),
    "extension": (pickled(b"\x82\x01"), "unsupported pickle opcode EXT1, which PyTorch does not write"),
    "old_instance": (
        pickled(b"(ios\nsystem\n"),
        "unsupported pickle opcode INST, which PyTorch does not write",
    ),
    "deep_lists": (pickled(b"]" * NESTED + b"a" * (NESTED - 1)), "invalid content: got list"),
    "deep_dicts": (
        pickled(b"".join([b"}" + text("a")] * NESTED) + b"N" + b"s" * NESTED),
        "nested too deeply; expected at most 8 levels",
    ),
    "a_tree_in_itself": (
        pickled(b"}q\0" + text("a") + b"h\0s"),
        "nested too deeply; expected at most 8 levels",
    ),
    "the_same_name_twice": (pickled(b"}(" + (text("w") + b"N") * 2 + b"u"), "duplicate name 'w'"),
    "a_name_of_two_lines": (pickled(tree(**{"a\nb": b"N"})), r"invalid name 'a\nb'"),
    "a_name_of_a_megabyte": (pickled(tree(**{"a" * 2**20: b"N"})), "invalid name 'aaaa"),
    "a_name_that_is_a_tuple": (pickled(b"})Ns"), "invalid name"),
    "no_tree": (pickled(number(1)), "invalid content: got int"),
    "an_empty_tree_in_it": (pickled(tree(a=b"}")), "invalid a: got dict"),
}


@pytest.mark.parametrize("damage", CORRUPT_PICKLES)
def test_a_corrupt_or_hostile_pickle_gives_one_line(path, damage):
    data, message = CORRUPT_PICKLES[damage]
    write(path, data)
    assert message in error_line(path)


def archive(path):
    write(path, pickled(tree(w=tensor())), s0=SIX)
    return path.read_bytes()


def entry_edited(content, name, offset, data):
    """The file with other bytes in the directory's entry of a member, counted from the entry's start."""
    start = content.rindex(b"PK\1\2", 0, content.rindex(name))
    return content[: start + offset] + data + content[start + offset + len(data) :]


CORRUPT_ARCHIVES = {
    "empty": (lambda content: b"", "empty file"),
    "web_page": (lambda content: b"<!DOCTYPE html><title>404</title>" * 9, "not a PyTorch file"),
    "half": (lambda content: content[: len(content) // 2], "not a PyTorch file, or a truncated one"),
    "one_byte_short": (lambda content: content[:-1], "not a PyTorch file, or a truncated one"),
    "front_missing": (lambda content: content[50:], "corrupt"),
    "flipped_bit": (
        lambda content: content.replace(SIX, b"\1" + SIX[1:]),
        "corrupt member x/data/0: checksum",
    ),
    "size_of_an_exabyte": (
        lambda content: entry_edited(content, b"x/data/0", 20, struct.pack("<II", 2**31, 2**31)),
        "has 2,147,483,648 bytes; expected 6 values",
    ),
    "pickle_of_a_gigabyte": (
        lambda content: entry_edited(content, b"x/data.pkl", 20, struct.pack("<II", 2**30, 2**30)),
        "got 1,073,741,824 bytes; expected at most 4,194,304",
    ),
    "beyond_the_end": (
        lambda content: entry_edited(content, b"x/data.pkl", 20, struct.pack("<II", 2**20, 2**20)),
        "x/data.pkl extends beyond the end of the file",
    ),
    "member_elsewhere": (
        lambda content: entry_edited(content, b"x/data.pkl", 42, struct.pack("<I", 7)),
        "no member x/data.pkl at its offset",
    ),
    "encrypted": (
        lambda content: entry_edited(content, b"x/data/0", 8, b"\1\0"),
        "encrypted member 'x/data/0'",
    ),
    "directory_of_gigabytes": (
        lambda content: content[:-10] + struct.pack("<I", 2**31) + content[-6:],
        "directory too large: got 2,147,483,648 bytes",
    ),
    "zip64_directory_of_terabytes": (
        lambda content: content[:-22] + b"PK\6\6" + bytes(36) + struct.pack("<QQ", 2**40, 0) + content[-22:],
        "directory too large: got 1,099,511,627,776 bytes",
    ),
    "before_1_6": (
        lambda content: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + content,
        "no complete pickle of at most 4,194,304 bytes",
    ),
}


@pytest.mark.parametrize("damage", CORRUPT_ARCHIVES)
def test_a_corrupt_archive_gives_one_line(path, damage):
    change, message = CORRUPT_ARCHIVES[damage]
    path.write_bytes(change(archive(path)))
    assert message in error_line(path)


def test_duplicate_members_are_errors(path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", b"")
        file.writestr("x/data.pkl", pickled(tree(w=tensor())))
    assert "duplicate name 'x/data.pkl'" in error_line(path)


@pytest.mark.parametrize("order", [b"middle", b""])
def test_an_unknown_byte_order_is_an_error(path, order):
    write(path, pickled(tree()), order=order)
    assert "invalid byte order: got" in error_line(path)


def test_another_zip_archive_is_an_error(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<w/>")
    assert "not a PyTorch file: expected a zip archive with one data.pkl" in error_line(path)


def test_a_missing_file_or_a_folder_is_an_error(path, tmp_path):
    assert "No such file" in error_line(path)
    assert "Is a directory" in error_line(tmp_path)


def test_torch_reads_what_is_written_and_is_read(path):
    """With PyTorch installed: its own reader, without any code, and its own writer."""
    torch = pytest.importorskip("torch")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.float32(1).reshape(())}
    arrays |= {"turned": arrays["a"].T, "alias": arrays["a"]}
    write_torch(path, arrays)
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name].numpy(), array)

    kinds = (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
    base = torch.arange(24).reshape(4, 6) % 2
    stored = {str(kind): base.to(kind) for kind in kinds}
    stored |= {
        "turned": base.float().T,
        "part": base.float()[1:, ::2],
        "parameter": torch.nn.Parameter(base.float()),
    }
    torch.save({"model": stored, "args": made.namespace, "step": 3}, path, pickle_protocol=4)
    for name, array in read(path, "model").items():
        expected = stored[name].detach()
        assert array.dtype.name == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(array.astype(np.float64), expected.double().numpy())


def test_many_views_of_one_storage_do_not_grow_beyond_the_file(path):
    parts = {f"w{i}": tensor(numel=60, offset=i, shape=(30,), strides=(1,)) for i in range(30)}
    write(path, pickled(tree(**parts)), s0=bytes(240))
    assert len(read(path)) == 30
    parts = {f"w{i}": tensor(numel=60000, offset=i, shape=(30000,), strides=(1,)) for i in range(30)}
    write(path, pickled(tree(**parts)), s0=bytes(240000))
    assert "tensors too large: got 3,600,000 bytes; expected at most twice the file's 24" in error_line(path)
