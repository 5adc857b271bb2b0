import logging
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_data_images import noise, png_header

from configs import imagefolder
from dig_jax import config
from dig_jax.components import Components
from dig_jax.data import Source, batches, image_folder, load_source
from dig_jax.data.images import HAS_AVIF
from dig_jax.data.summary import summary
from dig_jax.errors import ConfigError, UserError
from dig_jax.testing import tiny_settings
from dig_jax.training.train import train


def write(path, width=20, height=16, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(width, height, seed=seed)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of ordinary and unusual images, two of them corrupt."""
    root = tmp_path / "pictures"
    for number in range(6):
        write(root / "cat" / f"{number}.jpg", 16 + number, 20, number)
        write(root / "dog" / "puppies" / f"{number}.PNG", 30, 18 + number, 10 + number)
    Image.new("CMYK", (30, 20), (255, 0, 0, 0)).save(root / "cat" / "cmyk.jpg")
    Image.fromarray(noise(20, 20, 4)).save(root / "dog" / "alpha.png")
    (root / "cat" / "corrupt.jpg").write_bytes((root / "cat" / "0.jpg").read_bytes()[:300])
    (root / "dog" / "huge.png").write_bytes(png_header(60_000, 60_000))
    return root


def load(root, split="train", **options):
    return load_source("image_folder", split, path=str(root), **{"image_size": 8, **options})


def files(source):
    return list(source.images.files)


def test_classes_are_the_directories_in_order_and_images_lie_anywhere_below(folder):
    source = load(folder, heldout_fraction=0.0)
    assert isinstance(source, Source)
    assert source.class_names == ("cat", "dog")
    assert source.image_shape == (8, 8, 3)
    assert files(source) == [
        *(f"cat/{name}.jpg" for name in (0, 1, 2, 3, 4, 5, "cmyk", "corrupt")),
        "dog/alpha.png",
        "dog/huge.png",
        *(f"dog/puppies/{number}.PNG" for number in range(6)),
    ]
    labels = [int(example["label"]) for example in map(source.__getitem__, range(7))]
    assert labels == [0] * 7
    example = source[15]
    assert example["label"] == 1
    assert example["image"].shape == (8, 8, 3)
    assert example["image"].dtype == np.uint8


def test_corrupt_images_are_named_counted_and_replaced_the_same_way_every_time(folder, caplog):
    caplog.set_level(logging.WARNING)
    first, second = load(folder, heldout_fraction=0.0), load(folder, heldout_fraction=0.0)
    order = np.random.default_rng(0).permutation(len(first))
    backwards = {int(index): second[int(index)] for index in order}
    for index in range(len(first)):
        np.testing.assert_array_equal(first[index]["image"], backwards[index]["image"])
        assert first[index]["label"] == backwards[index]["label"]
    for index in range(len(first)):  # again
        _ = first[index]
    assert first.num_unreadable == second.num_unreadable == 2
    messages = [record.getMessage() for record in caplog.records]
    for name in ("cat/corrupt.jpg", "dog/huge.png"):
        assert sum(name in line for line in messages) == 2  # once by each source
    assert all("replaced unreadable image" in line and "\n" not in line for line in messages)


def test_many_corrupt_images_do_not_flood_the_log(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for number in range(120):
        path = tmp_path / "c" / f"{number:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"nothing")
    write(tmp_path / "c" / "good.jpg")
    source = load(tmp_path, heldout_fraction=0.0)
    for index in range(0, 121, 10):
        try:
            _ = source[index]
        except UserError as error:
            assert "100 unreadable images in a row" in str(error)
    assert source.num_unreadable > 100
    assert len(caplog.records) == 11
    assert caplog.records[-1].getMessage().startswith("replaced 100 unreadable images")


def test_batches_are_the_same_for_any_number_of_threads_and_processes(folder):
    def stream(count=1, index=0, **options):
        source = load(folder, heldout_fraction=0.0)
        iterator = batches(
            source, batch_size=8, seed=3, flip=True, process_count=count, process_index=index, **options
        )
        taken = [next(iterator) for _ in range(5)]
        iterator.close()
        return taken

    expected = stream(num_threads=0)
    for name in ("image", "label"):
        for other in (stream(num_threads=3), stream(num_threads=0, start=0)):
            np.testing.assert_array_equal([b[name] for b in expected], [b[name] for b in other])
        parts = [stream(count=2, index=index, num_threads=2) for index in range(2)]
        for whole, left, right in zip(expected, *parts, strict=True):
            np.testing.assert_array_equal(whole[name], np.concatenate([left[name], right[name]]))
        for whole, resumed in zip(expected[2:], stream(num_threads=1, start=16), strict=False):
            np.testing.assert_array_equal(whole[name], resumed[name])


def test_a_fraction_is_held_out_by_name_and_never_trained_on(folder):
    whole = files(load(folder, heldout_fraction=0.0))
    train, heldout = (load(folder, split, heldout_fraction=0.25) for split in ("train", "heldout"))
    assert len(heldout) == 4
    assert sorted(files(train) + files(heldout)) == sorted(whole)
    assert train.fingerprint != heldout.fingerprint
    assert len(load(folder, "heldout")) == 1
    assert len(load(folder, "heldout", heldout_fraction=0.0)) == 0


def test_a_second_directory_is_held_out_with_the_labels_of_the_first(folder, tmp_path):
    write(tmp_path / "val" / "dog" / "new.jpg")
    heldout = load(folder, "heldout", heldout_path=str(tmp_path / "val"))
    assert [int(heldout[i]["label"]) for i in range(len(heldout))] == [1]
    assert heldout.class_names == ("cat", "dog")
    assert len(load(folder, heldout_path=str(tmp_path / "val"))) == 16
    write(tmp_path / "val" / "cats" / "new.jpg")
    os.rename(tmp_path / "val", tmp_path / "other")
    with pytest.raises(UserError, match="unknown class 'cats' in .*; did you mean 'cat'"):
        load(folder, "heldout", heldout_path=str(tmp_path / "other"))


def test_other_files_are_ignored_and_counted(folder, tmp_path):
    expected = files(load(folder, heldout_fraction=0.0))
    (folder / "empty").mkdir()
    (folder / "README.txt").write_text("hello")
    (folder / "cat" / "notes.txt").write_text("hello")
    (folder / "cat" / "._0.jpg").write_bytes(b"left by macOS")
    (folder / "cat" / "directory.jpg").mkdir()
    (folder / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    write(folder / ".hidden" / "0.jpg")
    write(folder / "loose.jpg")
    moved = folder.rename(folder.with_name("moved"))
    (moved / "cat" / "1.heic").touch()
    (moved / "cat" / "LICENSE").touch()
    source = load(moved, heldout_fraction=0.0)
    assert files(source) == expected
    assert list(source.notes) == [
        f"ignored 1 images in {moved} that are not in a class directory",
        f"ignored 1 directories without images in {moved}: empty",
        "ignored 4 other files: 2 .txt, 1 .heic, 1 without extension",
    ]
    (tmp_path / "phone" / "cat").mkdir(parents=True)
    (tmp_path / "phone" / "cat" / "1.HEIC").touch()
    with pytest.raises(UserError, match="no images in .*phone, found 1 .heic; expected one directory"):
        load(tmp_path / "phone")


def test_links_that_loop_end_and_other_links_are_followed(folder, tmp_path):
    expected = files(load(folder, heldout_fraction=0.0))
    write(tmp_path / "elsewhere" / "a.jpg")
    (folder / "cat" / "self").symlink_to(".")
    (folder / "cat" / "up").symlink_to("..")
    (folder / "cat" / "ring").symlink_to("ring")
    (folder / "fox").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    moved = folder.rename(folder.with_name("moved"))
    source = load(moved, heldout_fraction=0.0)
    assert files(source) == [*expected, "fox/a.jpg"]
    assert source.class_names == ("cat", "dog", "fox")


def test_a_flat_directory_is_one_class(tmp_path):
    write(tmp_path / "flowers" / "1.jpg")
    write(tmp_path / "flowers" / "2.jpg")
    source = load(tmp_path / "flowers", heldout_fraction=0.0)
    assert source.class_names == ("flowers",)
    assert len(source) == 2


def test_the_fingerprint_depends_on_content_and_cropping_but_not_on_the_place(folder):
    prints = [load(folder, **options).fingerprint for options in ({}, {"image_size": 9}, {"upright": False})]
    prints.append(load(folder, heldout_fraction=0.3).fingerprint)
    moved = folder.rename(folder.with_name("moved"))
    assert load(moved).fingerprint == prints[0]
    for number, change in enumerate(
        [lambda p: (p / "dog").rename(p / "wolf"), lambda p: write(p / "a" / "0.jpg")]
    ):
        change(moved)
        moved = moved.rename(folder.with_name(f"moved {number}"))
        prints.append(load(moved).fingerprint)
    assert len(set(prints)) == len(prints)


def test_the_shipped_config_needs_the_directory_and_nothing_else(folder):
    components = Components(config.from_dict(imagefolder.get_config(str(folder)).to_dict()))
    assert components.train_source.image_shape == (64, 64, 3)
    assert components.train_source.class_names == ("cat", "dog")
    assert (len(components.train_source), len(components.heldout_source)) == (15, 1)
    missing = Components(config.from_dict(imagefolder.get_config().to_dict()))
    with pytest.raises(ConfigError, match="config.data: missing path of the image_folder source"):
        _ = missing.train_source


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path": ""}, "missing path of the image_folder source"),
        ({"path": "/nowhere/at/all"}, "no such directory: '/nowhere/at/all'"),
        ({"heldout_path": "/nowhere"}, "no such directory: '/nowhere'"),
        (
            {"heldout_fraction": 1.0},
            "invalid heldout_fraction=1.0 of the image_folder source; expected 0 ≤ x < 1",
        ),
        ({"image_size": 0}, "invalid image_size=0 of the image_folder source; expected at least 1"),
        ({"crop": "admm"}, "invalid crop='admm' .*; expected adm or celeba; did you mean 'adm'"),
        (
            {"crop": "celeba", "image_size": (8, 16)},
            r"image_size=\(8, 16\) .*; expected one number with crop",
        ),
        ({"channels": 4}, r"invalid channels=4 of the image_folder source; expected 3 \(RGB\) or 1 \(gray\)"),
        ({"size": 8}, "unknown option 'size'"),
    ],
)
def test_a_bad_option_is_named(folder, options, message):
    with pytest.raises((ValueError, UserError), match=message):
        load_source("image_folder", "heldout", **{"path": str(folder), **options})


def test_a_directory_without_images_or_with_a_single_one_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="no images in .*; expected one directory per class"):
        load(tmp_path)
    write(tmp_path / "one" / "x" / "1.jpg")
    with pytest.raises(
        UserError, match="too few images in .* for heldout_fraction=0.02: got 1; expected at least 2"
    ):
        load(tmp_path / "one")


def test_splits_are_not_taken_for_classes(folder):
    (folder / "cat").rename(folder / "train")
    (folder / "dog").rename(folder / "val")
    with pytest.raises(
        UserError, match="has directories named like splits: train, val; expected one directory per class"
    ):
        load(folder)


def test_a_missing_file_ends_the_run_and_is_not_replaced(folder):
    source = load(folder, heldout_fraction=0.0)
    (folder / "cat" / "0.jpg").unlink()
    with pytest.raises(UserError, match="cannot read .*cat/0.jpg: No such file"):
        _ = source[0]
    assert source.num_unreadable == 0


@pytest.mark.parametrize("extension", ["jfif", "JPE", "jpg", "PBM", *(["avif"] if HAS_AVIF else [])])
def test_files_of_every_name_of_a_format_are_images(tmp_path, extension):
    kind = {"PBM": "PPM", "avif": "AVIF"}.get(extension, "JPEG")
    path = tmp_path / "dog" / f"1.{extension}"
    write(path, format=kind)
    source = load(tmp_path, heldout_fraction=0.0)
    assert files(source) == [f"dog/1.{extension}"]
    assert source[0]["image"].shape == (8, 8, 3)
    assert source.num_unreadable == 0


def test_a_parent_of_the_class_directories_is_hinted_at(tmp_path):
    for number, name in enumerate(("ant", "bee", "cow")):
        write(tmp_path / "up" / "dataset" / "images" / name / "sub" / f"{number}.png")
    train, heldout = (load(tmp_path / "up", split) for split in ("train", "heldout"))
    assert train.class_names == ("dataset",)
    lines = summary(train, heldout)
    assert lines[0] == "2 images of 1 class (dataset), 1 held out; 8 × 8, 3 channels"
    right = tmp_path / "up" / "dataset" / "images"
    assert lines[1:] == [
        "all images are one class, 'dataset', and lie in 3 directories of dataset/images: ant, bee, cow; if"
        f" these are the classes, set path to {right}"
    ]
    assert summary(load(right), load(right, "heldout")) == [
        "2 images of 3 classes (ant, bee, cow), 1 held out; 8 × 8, 3 channels"
    ]


def test_a_class_with_images_in_subdirectories_and_beside_them_has_no_hint(tmp_path):
    write(tmp_path / "cat" / "1.png")
    write(tmp_path / "cat" / "old" / "2.png")
    write(tmp_path / "cat" / "new" / "3.png")
    assert load(tmp_path).notes == ()


def test_the_summary_counts_images_classes_and_held_out_ones(tmp_path):
    train = load_source("fake", "train", num_classes=9, length=1200)
    lines = summary(train, load_source("fake", "heldout", num_classes=9, length=1200))
    assert lines == ["1,200 images of 9 classes (0, 1, 2, 3, 4, …), 240 held out; 32 × 32, 3 channels"]
    write(tmp_path / "cat" / "1.png")
    train, heldout = (load(tmp_path, split, heldout_fraction=0.0) for split in ("train", "heldout"))
    assert summary(train, heldout)[0].startswith("1 images of 1 class (cat), none held out; ")
    assert "keep_best have no effect" in summary(train, heldout)[1]


def test_images_may_be_gray_and_of_any_shape(folder):
    source = load(folder, image_size=(8, 20), channels=1, heldout_fraction=0.0)
    assert source.image_shape == source[0]["image"].shape == (8, 20, 1)
    square = load(folder, image_size=8, heldout_fraction=0.0)
    assert load(folder, image_size=[8, 8], heldout_fraction=0.0).fingerprint == square.fingerprint
    prints = {source.fingerprint, square.fingerprint, load(folder, channels=1).fingerprint}
    assert len(prints) == 3


def test_the_fingerprint_of_square_rgb_images_never_changes(tmp_path):
    """A resumed run compares it."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(b"1234")
    assert load(tmp_path, image_size=8, heldout_fraction=0.0).fingerprint == "f7e23b4644e823f4"


def test_sources_can_be_pickled(folder):
    source = load(folder, heldout_fraction=0.0)
    _ = [source[index] for index in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.fingerprint, copy.num_unreadable) == (source.fingerprint, 2)
    np.testing.assert_array_equal(copy[0]["image"], source[0]["image"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder):
    source = load(folder, heldout_fraction=0.0)
    (folder / "cat" / "0.jpg").unlink()
    os.mkfifo(folder / "cat" / "0.jpg")
    with pytest.raises(UserError, match="cannot read .*cat/0.jpg: not a regular file"):
        _ = source[0]


@pytest.mark.parametrize("place", ["", "cat", "cat/../run", "link/run"])
def test_a_workdir_among_the_images_is_refused_before_anything_is_written(folder, tmp_path, place):
    (tmp_path / "pictures" / "link").symlink_to(folder / "dog")
    options = {"path": str(folder), "image_size": 4, "heldout_fraction": 0.1}
    settings = tiny_settings(data__name="image_folder", data__options=options)
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        ConfigError, match="invalid --workdir=.*: inside the images in .*pictures; expected an"
    ):
        train(settings, folder / place)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_classes_are_named_the_same_in_every_locale_and_need_not_be_utf_8(tmp_path):
    root = tmp_path / os.fsdecode(b"d\xe9ta")
    for name in (b"caf\xe9", "naïve".encode(), b"dog"):
        write(root / os.fsdecode(name) / os.fsdecode(b"\xe9.png"))
    source = load(root, heldout_fraction=0.0)
    assert source.class_names == ("caf\udce9", "dog", "naïve")
    assert source[0]["image"].shape == (8, 8, 3)
    assert source.num_unreadable == 0
    code = (
        "import os, sys; from dig_jax.data import load_source;"
        "path = os.fsdecode(bytes.fromhex(sys.argv[1]));"
        "options = {'path': path, 'image_size': 8, 'heldout_fraction': 0.0};"
        "print(load_source('image_folder', 'train', **options).fingerprint)"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, os.fsencode(root).hex()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == source.fingerprint


def test_the_directory_of_the_images_is_known(folder):
    assert image_folder.folder(load(folder)) == folder
    assert image_folder.folder(load_source("fake", "train")) is None
