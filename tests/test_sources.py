import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dig_jax.data import Source, load_source


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
        ("digits", "train", {"image_size": 8}, "unknown option 'image_size' .*; expected none"),
        ("fake", "train", {"size": 8}, "unknown option 'size' .*; expected image_size, .* 'image_size'"),
        ("fake", "train", {"length": 0}, "invalid length=0 of the fake source; expected at least 1"),
        ("fake", "train", {"image_size": (0, 8)}, "invalid image_size=0 of the fake source"),
    ],
)
def test_a_bad_argument_is_named(name, split, options, message):
    with pytest.raises(ValueError, match=message):
        load_source(name, split, **options)
