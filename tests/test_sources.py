import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from latent_caches import random_moments, write_cache

from dig_jax.data import Source, load_source, open_source
from dig_jax.data.registry import SOURCES
from dig_jax.errors import ConfigError, UserError


def test_digits_are_split_by_class_without_overlap_or_loss():
    from sklearn.datasets import load_digits

    train, heldout = load_source("digits", "train"), load_source("digits", "heldout")
    assert (len(train), len(heldout)) == (1437, 360)
    assert np.bincount(heldout.labels).tolist() == [36] * 10

    def rows(images, labels):
        return sorted(map(tuple, np.column_stack([images.reshape(len(images), -1), labels]).tolist()))

    real = load_digits()
    both = np.concatenate([train.images, heldout.images]), np.concatenate([train.labels, heldout.labels])
    assert rows(*both) == rows(np.rint(real.images * 255 / 16).astype(int), real.target)
    assert train.images.max() == 255


def test_fingerprints_of_the_digits_never_change():
    """A resumed run compares them: if this fails, the content or the split of the digits has changed."""
    assert load_source("digits", "train").fingerprint == "7756538cb0234915"
    assert load_source("digits", "heldout").fingerprint == "7756de43d5d3fd5e"


def test_examples_in_memory_cannot_be_changed_by_their_reader():
    with pytest.raises(ValueError, match="read-only"):
        load_source("digits", "train")[0]["image"][:] = 0


@pytest.mark.parametrize(
    "name, options", [("digits", {}), ("fake", {"image_size": (4, 6), "num_classes": 7})]
)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_examples_are_what_the_source_says(name, options, split):
    source = load_source(name, split, **options)
    assert isinstance(source, Source)
    assert source.name == name
    assert source.split == split
    assert len(source.class_names) == source.num_classes
    for index in (0, len(source) - 1):
        example = source[index]
        assert set(example) == {"image", "label"}
        assert example["image"].dtype == np.uint8
        assert example["image"].shape == source.image_shape
        assert example["label"].dtype == np.int32
        assert 0 <= example["label"] < source.num_classes


@given(st.integers(0, 199), st.integers(0, 3))
def test_fake_images_depend_on_index_split_and_seed_alone(index, seed):
    def image(split="train", **options):
        options = {"image_size": 8, "length": 1000, "seed": seed, **options}
        return load_source("fake", split, **options)[index]["image"]

    np.testing.assert_array_equal(image(), image())
    assert (image() != image("heldout")).any()
    assert (image() != image(seed=seed + 1)).any()


def test_fake_classes_can_be_learned():
    source = load_source("fake", "train", image_size=16, length=400)
    images = np.stack([example["image"] for example in source])
    labels = np.array([example["label"] for example in source])
    spectra = np.abs(np.fft.fft2(images.astype(float), axes=(1, 2))).sum(-1)
    spectra[:, 0, 0] = 0
    spectra = (spectra / spectra.sum((1, 2), keepdims=True)).reshape(400, -1)
    means = np.stack([spectra[:200][labels[:200] == label].mean(0) for label in range(10)])
    nearest = np.linalg.norm(spectra[200:, None] - means, axis=-1).argmin(-1)
    assert np.mean(nearest == labels[200:]) > 0.95


def test_a_mirrored_fake_image_keeps_its_class():
    for example in load_source("fake", "train", image_size=(8, 12), length=20):
        image = example["image"].astype(int)
        assert np.abs(image - image[:, ::-1]).max() <= 33  # noise is all that tells them apart


def test_fingerprints_tell_sources_apart():
    options = [{}, {"seed": 1}, {"length": 7}, {"image_size": 4}, {"channels": 1}, {"num_classes": 2}]
    sources = [load_source("fake", "train", **option) for option in options]
    sources += [load_source("fake", "heldout"), load_source("digits", "train")]
    assert len({source.fingerprint for source in sources}) == len(sources)


@pytest.mark.parametrize(
    "name, split, options, message",
    [
        ("digit", "train", {}, "unknown data source 'digit'; .*; did you mean 'digits'"),
        ("hubble", "train", {}, "expected digits, fake, image_folder, .*; did you mean 'hub'"),
        ("digits", "test", {}, "unknown split 'test'; expected train or heldout"),
        ("digits", "train", {"size": 8}, "unknown option 'size' .*; expected image_size"),
        ("digits", "train", {"image_size": 12}, "invalid image_size=12 .*; expected a multiple of 8"),
        ("fake", "train", {"size": 8}, "unknown option 'size' .*; expected image_size, .* 'image_size'"),
        ("fake", "train", {"length": 0}, "invalid length=0 of the fake source; expected at least 1"),
        ("fake", "train", {"image_size": (0, 8)}, r"invalid image_size=\(0, 8\) of the fake source"),
    ],
)
def test_a_bad_argument_is_named(name, split, options, message):
    with pytest.raises(ValueError, match=message):
        load_source(name, split, **options)


DEEP = functools.reduce(lambda inner, _: [inner], range(900), 1)


@pytest.mark.parametrize(
    "name, option, value, expected",
    [
        ("fake", "image_size", "88", "an integer or a tuple of 2 integers"),
        ("fake", "image_size", None, "an integer or a tuple of 2 integers"),
        ("fake", "image_size", 8.0, "an integer or a tuple of 2 integers"),
        ("fake", "image_size", True, "an integer or a tuple of 2 integers"),
        ("fake", "image_size", (8, 8, 8), "an integer or a tuple of 2 integers"),
        ("fake", "image_size", (8, "8"), "an integer or a tuple of 2 integers"),
        ("fake", "image_size", DEEP, "an integer or a tuple of 2 integers"),
        ("fake", "image_size", 10**23, "at most 89,478,485 pixels"),
        ("fake", "num_classes", 10**23, "at most 1,000,000"),
        ("fake", "length", 10**23, "at most 1,000,000,000"),
        ("fake", "seed", -1, "at least 0"),
        ("fake", "path", {"a": 1}, "text without null characters"),
        ("image_folder", "path", 5, "text without null characters"),
        ("image_folder", "path", "a\0b", "text without null characters"),
        ("image_folder", "heldout_fraction", "0.1", "a number"),
        ("image_folder", "heldout_fraction", float("nan"), "0 ≤ x < 1"),
        ("image_folder", "crop", 5, "text without null characters"),
        ("image_folder", "upright", 1, "True or False"),
        ("latents", "path", ["a"], "text without null characters"),
        ("latents", "image_size", "32", "an integer or a tuple of 2 integers"),
        ("tfds", "dataset", ["a"], "text without null characters"),
        ("tfds", "num_classes", 1.5, "an integer"),
        ("hub", "dataset", ["a"], "text without null characters"),
        ("hub", "channels", "3", "an integer"),
    ],
)
def test_options_are_checked_by_the_signature_of_the_source_and_named_by_their_field(
    tmp_path, name, option, value, expected
):
    options = ({"path": str(tmp_path)} if name == "image_folder" else {}) | {option: value}
    with pytest.raises(ConfigError) as caught:
        open_source("config.data", name, "train", options)
    message = str(caught.value)
    assert message.startswith(f"invalid config.data.options.{option}=")
    assert message.endswith(f"; expected {expected}")
    assert len(message) < 300 and "\n" not in message


@pytest.mark.parametrize("option", ["split", "name", 1, "a.b", "__class__", None, ("a",)])
@pytest.mark.parametrize("name", SOURCES)
def test_an_unknown_option_is_named_whatever_its_type(name, option):
    with pytest.raises(ConfigError, match=f"config.encode: unknown option .* of data source '{name}'"):
        open_source("config.encode", name, "train", {option: 1})


def test_options_become_the_types_of_the_signature(tmp_path):
    source = load_source("fake", "train", image_size=[4, 6], length=np.int64(3), path=tmp_path)
    assert source.image_shape == (4, 6, 3)
    assert type(source.length) is int


def test_a_source_without_images_to_train_on_is_refused(tmp_path):
    write_cache(tmp_path / "latents", random_moments(0), random_moments(3))
    with pytest.raises(ConfigError, match="no images in the training split of data source 'latents'"):
        open_source("config.data", "latents", "train", {"path": str(tmp_path / "latents")})
    assert len(open_source("config.data", "latents", "heldout", {"path": str(tmp_path / "latents")})) == 3


def test_a_latent_label_that_no_class_has_is_named(tmp_path):
    write_cache(tmp_path, random_moments(4), class_names=["cat", "dog"])
    source = load_source("latents", "train", path=str(tmp_path))
    assert [source[index]["label"] for index in range(2)] == [0, 1]
    with pytest.raises(UserError, match="invalid label of image 2 of .*: got 2; expected 0 to 1"):
        _ = source[2]
