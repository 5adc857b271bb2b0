import io
import logging
import shutil
import socket
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_data_images import noise

from dig_jax.data import archives, batches, load_source
from dig_jax.data.images import adm_crop, decode
from dig_jax.errors import UserError

ANIMALS = ["cat", "dog", "fox"]
CORRUPT = 4


@pytest.fixture(scope="module", autouse=True)
def library():
    return pytest.importorskip("datasets", reason="pip install -e '.[hub]'")


def image_file(number):
    """A JPEG or PNG; some are gray, CMYK or transparent, and one is corrupt."""
    image = Image.fromarray(noise(20 + number, 24, seed=number))
    image = image.convert({1: "L", 2: "CMYK", 3: "RGBA", 5: "P"}.get(number, "RGB"))
    file = io.BytesIO()
    image.save(file, "PNG" if image.mode in ("RGBA", "P") else "JPEG")
    return file.getvalue()[: 300 if number == CORRUPT else None]


def write_declared(library, path, numbers, labels=lambda number: number % 3):
    """As `push_to_hub` writes shards: with the kinds of the columns in them."""
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=ANIMALS)})
    columns = {
        "image": [{"bytes": image_file(number), "path": None} for number in numbers],
        "label": [labels(number) for number in numbers],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # given a path, it shows a bar of progress
        library.Dataset.from_dict(columns, features=features).to_parquet(file)


def write_plain(path, **columns):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def write_tar(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for kind, data in (("jpg", image_file(0)), ("cls", b"%d" % (number % 3))):
                member = tarfile.TarInfo(f"{number:05}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def root(library, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for shard in range(3):
        numbers = range(3 * shard, 3 * shard + 3)
        write_declared(library, root / "animals" / f"data/train-0000{shard}-of-00003.parquet", numbers)
    write_declared(library, root / "animals/data/test-00000-of-00001.parquet", range(3))
    write_declared(library, root / "animals/data/validation-00000-of-00001.parquet", range(2))
    return root


def load(root, dataset="animals", split="train", **options):
    options = {"image_size": 8, "cache_dir": str(root / "cache"), **options}
    return load_source("hub", split, dataset=str(root / dataset), **options)


def test_examples_are_those_that_were_written(root):
    source = load(root)
    assert (source.name, source.class_names, len(source)) == ("hub", tuple(ANIMALS), 9)
    for index in set(range(9)) - {CORRUPT}:
        expected = adm_crop(decode(image_file(index), upright=False), 8)
        np.testing.assert_array_equal(source[index]["image"], expected)
        assert source[index]["label"] == index % 3


def test_a_corrupt_image_is_named_and_replaced(root, caplog):
    caplog.set_level(logging.WARNING, logger="dig_jax")
    source = load(root)
    replaced = source[CORRUPT]
    assert source.num_unreadable == 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"replaced unreadable image row {CORRUPT} of {root / 'animals'} train: ")
    again = load(root)[CORRUPT]
    np.testing.assert_array_equal(replaced["image"], again["image"])
    assert replaced["label"] == again["label"]


def test_threads_read_the_same_batches(root):
    def stream(threads):
        iterator = batches(load(root), batch_size=6, seed=1, num_threads=threads)
        taken = [next(iterator)["image"] for _ in range(4)]
        iterator.close()
        return np.stack(taken)

    np.testing.assert_array_equal(stream(0), stream(3))


def test_held_out_images_are_the_validation_split_or_else_the_one_that_is_named(root, library):
    assert len(load(root, split="heldout")) == 2
    assert len(load(root, split="heldout", heldout_split="test")) == 3
    assert len(load(root, train_split="train[:6]")) == 6
    with pytest.raises(UserError, match="cannot open split 'tran' of .*: .* one of .'train', "):
        load(root, train_split="tran")
    write_declared(library, root / "whole/train.parquet", range(4))
    with pytest.raises(UserError, match="neither a validation nor a test split; set train_split"):
        load(root, "whole", "heldout")
    with pytest.raises(UserError, match="has 3 classes; expected num_classes=10"):
        load(root, num_classes=10)


def test_columns_that_are_declared_nowhere_are_recognized(root):
    images = [image_file(0)] * 5
    stored = [{"bytes": image, "path": "/etc/passwd"} for image in images]
    for name, column in {"bytes": images, "struct": stored}.items():
        write_plain(root / name / "train.parquet", jpg=column, cls=[0, 1, 2, 4, 1], url=["x"] * 5)
        write_plain(root / name / "test.parquet", jpg=column[:2], cls=[3, 0], url=["x"] * 2)
        source = load(root, name)
        assert (source.class_names, source[3]["label"]) == (tuple("01234"), 4)
        assert load(root, name, "heldout").class_names == tuple("01234")
        assert load(root, name, num_classes=7).num_classes == 7
    write_plain(root / "unlabelled/train.parquet", image=images)
    source = load(root, "unlabelled")
    assert (source.class_names, source[1]["label"]) == ((), 0)


def test_an_image_that_is_a_path_alone_is_not_followed(root, tmp_path, caplog):
    path = tmp_path / "secret.jpg"
    path.write_bytes(image_file(0))
    rows = [{"bytes": None, "path": str(path)}, {"bytes": image_file(1), "path": None}]
    write_plain(root / "paths/train.parquet", image=rows, label=[0, 1])
    source = load(root, "paths")
    assert [source[index]["label"] for index in range(2)] == [1, 1]
    assert source.num_unreadable == 1


ONE = {"image": [b"1"], "label": [1]}


@pytest.mark.parametrize(
    "columns, options, message",
    [
        ({"text": ["a"]}, {}, r"has 0 image columns \(text\); expected one"),
        ({"a": [b"1"], "b": [b"2"]}, {}, r"has 2 image columns \(a, b\); expected one"),
        (ONE | {"label": ["cat"]}, {}, "column 'label' of .* has type string; expected integers from 0"),
        (ONE | {"label": [[1]]}, {}, "column 'label' of .* expected integers from 0"),
        (ONE | {"class": [2]}, {}, "missing label; expected one of the columns label, class"),
        (ONE, {"label": "lable"}, "invalid label='lable'; expected a column of .*; did you mean 'label'"),
        (ONE, {"image": "label"}, r"has 0 image columns \(image, label\); expected one"),
        (ONE | {"label": [-1]}, {}, "invalid label of row 0 of .*: got -1; expected 0 to 0; -1 means unlab"),
        (
            {"image": [b"1", b"2"], "label": [3, None]},
            {},
            r"row 1 of split 'train' of .* \(labels -1 to 3\): got -1; expected 0 to 3",
        ),
        (ONE | {"label": [10**12]}, {}, "got label 1000000000000 in row 0 of .*; expected at most 1,000,000"),
        (ONE | {"label": [2**62]}, {}, "too many classes: got label 4611686018427387904 in row 0 of"),
        (ONE | {"label": np.array([2**64 - 1], np.uint64)}, {}, "invalid column 'label': .*; expected integ"),
        (
            ONE,
            {"num_classes": 10**23},
            "too many classes: .* and num_classes=1.*; expected at most 1,000,000",
        ),
    ],
)
def test_unsuitable_columns_are_reported_in_one_line(tmp_path, columns, options, message):
    write_plain(tmp_path / "shards/train.parquet", **columns)
    with pytest.raises((UserError, ValueError), match=message) as caught:
        load(tmp_path, "shards", **options)
    assert "\n" not in str(caught.value)


def test_tars_are_read_by_index_too(root):
    write_tar(root / "tars/train-000000.tar", range(4))
    write_tar(root / "tars/train-000001.tar", range(4, 7))
    source = load(root, "tars")
    assert len(source) == 7
    assert [source[index]["label"] for index in (6, 0, 5)] == [0, 0, 2]
    np.testing.assert_array_equal(source[6]["image"], adm_crop(decode(image_file(0)), 8))


def test_fingerprints_tell_splits_contents_and_crops_apart(root, library, tmp_path):
    sources = [load(root), load(root, split="heldout"), load(root, train_split="train[:5]")]
    sources += [load(root, image_size=9)]
    assert len({source.fingerprint for source in sources}) == len(sources)
    moved = shutil.copytree(root / "animals", tmp_path / "moved")
    assert load(tmp_path, moved).fingerprint == sources[0].fingerprint
    shard = moved / "data/train-00000-of-00003.parquet"
    write_declared(library, shard, range(3), labels=lambda _: 0)
    assert load(tmp_path, moved).fingerprint != sources[0].fingerprint


def test_local_shards_are_read_without_a_network_and_nothing_in_them_is_run(root, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(socket.socket, "connect", lambda *_: called.append("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: called.append("getaddrinfo"))
    copy = shutil.copytree(root / "animals", tmp_path / "shards")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    (copy / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert len(load(tmp_path, "shards")) == 9
    (copy / "shards.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="datasets cannot open .*shards: .* no longer supported"):
        load(tmp_path, "shards")
    assert not (tmp_path / "ran").exists()
    assert not called


@pytest.mark.parametrize("pattern", ["../secret/*.parquet", "{tmp}/secret/train.parquet", "/{tmp}/secret/*"])
def test_a_readme_cannot_name_files_outside_its_folder(root, tmp_path, pattern):
    copy = shutil.copytree(root / "animals", tmp_path / "shards")
    (tmp_path / "secret").mkdir()
    shutil.copy(copy / "data/test-00000-of-00001.parquet", tmp_path / "secret/train.parquet")
    front = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {}\n    path: '{}'\n---\n"
    (copy / "README.md").write_text(front.format("train", pattern.format(tmp=tmp_path)))
    with pytest.raises(
        UserError, match="invalid data file '.*secret.*' in README.md of .*: outside the folder"
    ):
        load(tmp_path, "shards")
    (copy / "README.md").write_text(front.format("train", "data/train-*"))
    assert len(load(tmp_path, "shards", train_split="train[:6]", split="train")) == 6


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("00005.jpg.gz", b"", "compressed member '00005.jpg.gz' of .*00.tar"),
        ("00005.npz", b"", "compressed member '00005.npz'"),
        ("00005.jpg", None, "member '00005.jpg' of .* is too large; expected at most 1 MiB"),
    ],
)
def test_a_member_of_a_tar_that_takes_gigabytes_is_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(archives, "MAX_BYTES", 2**20)
    path = tmp_path / "tars/train-000000.tar"
    write_tar(path, range(4))
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        if content is None:  # sparse: 3 GiB of zeros in 512 bytes
            member.size = 512
            member.pax_headers = {
                "GNU.sparse.major": "0",
                "GNU.sparse.minor": "1",
                "GNU.sparse.size": str(3 * 2**30),
                "GNU.sparse.numblocks": "1",
                "GNU.sparse.map": "0,512",
            }
            content = bytes(512)
        archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "tars")
    assert "\n" not in str(caught.value)


def test_invalid_and_missing_shards_are_reported_in_one_line(root, tmp_path, capfd, monkeypatch):
    with pytest.raises(ValueError, match="missing dataset of the hub source"):
        load_source("hub", "train")
    with pytest.raises(
        UserError, match="invalid dataset '.*' of the hub source; expected an existing folder"
    ):
        load(tmp_path, "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures/cat").mkdir(parents=True)
    (tmp_path / "pictures/cat/1.jpg").write_bytes(image_file(0))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.csv").write_text("label\n1\n")
    truncated = tmp_path / "truncated/train.parquet"
    truncated.parent.mkdir()
    whole = root / "animals/data/train-00000-of-00003.parquet"
    truncated.write_bytes(whole.read_bytes()[:-50])
    for name, message in {
        "empty": "datasets cannot open .*empty: EmptyDatasetError",
        "pictures": "got imagefolder; expected shards .* config.data.name=image_folder",
        "tables": "unsupported format of .*: got csv; expected shards",
        "truncated": "datasets cannot open .*truncated: ArrowInvalid: ",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load(tmp_path, name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="invalid dataset 'pandas'"):  # that reader takes pickles
        load_source("hub", "train", dataset="pandas")

    def resolve(*_, **__):
        raise RuntimeError("no network")  # an OSError would be tried again, for 25 seconds

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UserError, match="datasets cannot open nobody/nothing: ") as caught:
        load_source("hub", "train", dataset="nobody/nothing", cache_dir=str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_without_the_library_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[hub\]'"):
        load_source("hub", "train", dataset="a/b")
