import zipfile

import numpy as np
import pytest
from fake_features import random_images
from PIL import Image

from dig_jax.data import load_source
from dig_jax.errors import UserError
from dig_jax.evaluation.image_sets import FolderImages, NpzImages, SourceImages, open_images
from dig_jax.testing import tiny_components

IMAGES = random_images(0, 11)


def read(images, first=0, size=4, stop=None):
    parts = list(images.parts(first, size, len(images) if stop is None else stop))
    indices, pixels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    np.testing.assert_array_equal(indices, np.arange(first, len(images) if stop is None else stop))
    return pixels


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(path / f"{number:03}.png")
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_is_read_in_parts_from_any_image_on(save, tmp_path):
    save(tmp_path / "x.npz", arr_0=IMAGES, arr_1=np.arange(11))
    images = open_images(tmp_path / "x.npz")
    assert (len(images), images.shape) == (11, (8, 8, 3))
    np.testing.assert_array_equal(read(images), IMAGES)
    np.testing.assert_array_equal(read(images, 3, 2, 9), IMAGES[3:9])


def test_the_fingerprint_of_an_npz_file_is_about_its_images(tmp_path):
    for name, images in (("a", IMAGES), ("b", IMAGES), ("c", IMAGES[::-1])):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    a, b, c = (NpzImages(tmp_path / f"{name}.npz").fingerprint for name in "abc")
    assert a == b != c


def test_a_folder_is_read_in_parts_and_its_images_have_one_size(folder):
    images = open_images(folder)
    assert (len(images), images.shape) == (11, (8, 8, 3))
    np.testing.assert_array_equal(read(images), IMAGES)
    np.testing.assert_array_equal(read(images, 5), IMAGES[5:])
    Image.fromarray(random_images(1, 1, size=16)[0]).save(folder / "004.png")
    with pytest.raises(UserError, match=r"different sizes in .*: got 16×16 in .*004.png; expected 8×8 as"):
        read(images)


def test_a_folder_of_references_is_cropped_to_the_size_of_the_images_to_score(folder):
    np.testing.assert_array_equal(read(FolderImages(folder, (8, 8, 3))), IMAGES)
    small = FolderImages(folder, (4, 4, 1))
    assert read(small).shape == (11, 4, 4, 1)
    assert "cropped" in small.name
    assert small.fingerprint != FolderImages(folder).fingerprint


def test_a_damaged_image_is_named(folder):
    (folder / "002.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(UserError, match=r"cannot read .*002.png: unsupported format or corrupt header"):
        read(open_images(folder))


def test_a_data_source_is_read_in_order():
    source = load_source("digits", "heldout")
    images = SourceImages(source)
    assert (len(images), images.shape) == (360, (8, 8, 1))
    np.testing.assert_array_equal(read(images, size=100), source.images)
    assert images.fingerprint == source.fingerprint


def test_latents_are_no_reference():
    options = {"image_size": 4, "channels": 4, "num_classes": 5, "length": 9}
    source = tiny_components(data__options=options).train_source
    with pytest.raises(UserError, match=r"expected uint8 .* Set config.evaluation.reference to a folder"):
        SourceImages(source)


def test_a_missing_folder_or_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no such folder or file: .*/nothing; expected a folder of images"):
        open_images(tmp_path / "nothing")


@pytest.mark.parametrize(
    "array, message",
    [
        (IMAGES.astype(np.float32), r"got float32 \[11, 8, 8, 3\]; expected uint8 \[n, height"),
        (IMAGES[0], r"got uint8 \[8, 8, 3\]"),
        (IMAGES[..., :2], r"got uint8 \[11, 8, 8, 2\]"),
        (IMAGES.swapaxes(0, 3).copy().swapaxes(0, 3), "in Fortran order|expected uint8"),
    ],
    ids=["dtype", "one image", "channels", "order"],
)
def test_arrays_that_are_no_images_are_errors(array, message, tmp_path):
    array = np.asfortranarray(array) if "Fortran" in message else np.ascontiguousarray(array)
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UserError, match=message):
        _ = NpzImages(tmp_path / "x.npz").shape


def test_a_file_without_images_lists_what_it_has(tmp_path):
    np.savez(tmp_path / "x.npz", mean=np.zeros(3), other=np.zeros(2))
    with pytest.raises(UserError, match="no images in .*: got mean, other; expected the array arr_0"):
        _ = NpzImages(tmp_path / "x.npz").shape


def test_damaged_npz_files_are_one_line(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=IMAGES)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no zip", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged .*x.npz: .*; write or download it again"):
            _ = NpzImages(path).shape
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(UserError, match="damaged .*Bad CRC-32"):
        read(NpzImages(path), size=11)
    header = {"descr": "|u1", "fortran_order": False, "shape": (99, 8, 8, 3)}
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
        member.write(IMAGES.tobytes())
    with pytest.raises(UserError, match="damaged .*the images end early"):
        read(NpzImages(path))
