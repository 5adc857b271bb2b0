"""PyTorch files, valid and invalid, written byte by byte."""

import struct
import zipfile

ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind="FloatStorage", key="0", numel=6, module="torch"):
    name = f"c{module}\n{kind}\n".encode()
    return b"(" + text("storage") + name + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(*, offset=0, shape=(2, 3), strides=(3, 1), **of):
    sizes = number(offset) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**of) + sizes + b"\x89" + ORDERED_DICT + b"tR"


def parameter(**of):
    return b"ctorch._utils\n_rebuild_parameter\n(" + tensor(**of) + b"\x88" + ORDERED_DICT + b"tR"


def namespace(**attributes):
    state = b"}(" + b"".join(text(k) + text(v) for k, v in attributes.items()) + b"u"
    return b"cargparse\nNamespace\n)\x81" + state + b"b"


def tree(**entries):
    return ORDERED_DICT + b"(" + b"".join(text(k) + v for k, v in entries.items()) + b"u"


def pickled(value):
    return b"\x80\x02" + value + b"."


def write(path, pickle, *, order=b"little", compression=zipfile.ZIP_STORED, **members):
    """An archive; `members` are storages by their keys, with "s" before them."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickle)
        if order is not None:
            archive.writestr("x/byteorder", order)
        for key, data in members.items():
            archive.writestr(f"x/data/{key[1:]}", data)
    return path


LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_SYSTEM = b"}(" + text("protocol_version") + number(1001) + text("little_endian") + b"\x88u"


def write_legacy(path, content, *, version=1001, system=LEGACY_SYSTEM, keys=None, **storages):
    """A file of PyTorch before 1.6; `storages` are (number of values, bytes) by "s" and their keys."""
    keys = [key[1:] for key in storages] if keys is None else keys
    parts = [
        LEGACY_MAGIC,
        pickled(number(version)),
        pickled(system),
        pickled(content),
        pickled(b"](" + b"".join(map(text, keys)) + b"e"),
    ]
    parts += [struct.pack("<q", count) + data for count, data in storages.values()]
    path.write_bytes(b"".join(parts))
    return path
