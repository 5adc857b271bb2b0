import dataclasses
import itertools
import json
import pickle
import shutil
from contextlib import closing

import numpy as np
import pytest
from latent_caches import HEADER, random_moments, write_cache, write_index

from dig_jax import config
from dig_jax.data import Source, batches, epoch, load_source
from dig_jax.data.latents import check_latents
from dig_jax.errors import ConfigError, UserError
from dig_jax.testing import tiny_settings

SCALE = np.float32(0.5)


@pytest.fixture(scope="module")
def moments():
    return random_moments(10)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, moments):
    return write_cache(tmp_path_factory.mktemp("cache"), moments, random_moments(3, seed=1))


@pytest.fixture
def copy(cache, tmp_path):
    """A cache that the test may damage."""
    return shutil.copytree(cache, tmp_path / "copy")


def load(directory, split="train", **options):
    return load_source("latents", split, path=str(directory), **options)


def take(source, count, *, batch_size=4, start=0, **options):
    """The first images and labels of a stream."""
    options = {"seed": 3, "flip": True, "num_threads": 0, **options}
    with closing(batches(source, batch_size=batch_size, start=start, **options)) as stream:
        parts = list(itertools.islice(stream, -(-count // batch_size)))
    return tuple(np.concatenate([part[name] for part in parts])[:count] for name in ("image", "label"))


def split_moments(moments):
    return moments[..., :2], moments[..., 2:]


def test_a_cache_is_a_source_of_the_posteriors_means(cache, moments):
    source = load(cache, image_size=4, channels=2, num_classes=3)
    assert isinstance(source, Source)
    assert (len(source), source.image_shape, source.num_classes) == (10, (4, 4, 2), 3)
    assert (source.class_names, source.flip) == (("cat", "dog", "eel"), True)
    for index in range(10):
        example = source[index]
        np.testing.assert_array_equal(example["image"], split_moments(moments)[0][index, 0] * SCALE)
        assert example["image"].dtype == np.float32
        assert example["label"] == index % 3
    for index in (-1, 10):
        with pytest.raises(IndexError):
            source[index]


def test_a_held_out_pass_shows_means_as_they_are(cache):
    source = load(cache, "heldout")
    (batch,) = epoch(source, batch_size=4)
    expected = split_moments(random_moments(3, seed=1))[0][:, 0] * SCALE
    np.testing.assert_array_equal(batch["image"][:3], expected)
    np.testing.assert_array_equal(batch["label"], [0, 1, 2, 2])
    np.testing.assert_array_equal(batch["mask"], [True] * 3 + [False])


def test_draws_have_the_posteriors_mean_and_deviation_and_are_fresh_each_epoch(tmp_path, moments):
    mirrored_alike = np.repeat(moments[:2, :1], 2, axis=1)
    source = load(write_cache(tmp_path / "alike", mirrored_alike))
    epochs = 3000
    images, labels = take(source, 2 * epochs, batch_size=500)
    for label, (mean, logvar) in enumerate(zip(*split_moments(mirrored_alike[:, 0]), strict=True)):
        drawn = images[labels == label].astype(np.float64) / SCALE
        assert len(np.unique(drawn[:, 0, 0, 0])) == epochs
        deviation = np.exp(0.5 * logvar)
        assert np.all(np.abs(drawn.mean(0) - mean) < 5 * deviation / np.sqrt(epochs))
        np.testing.assert_allclose(drawn.std(0), deviation, rtol=5 / np.sqrt(2 * epochs))


def test_mirrored_examples_are_the_mirrored_images_moments(tmp_path, moments):
    sharp = moments.copy()
    sharp[..., 2:] = -30
    source = load(write_cache(tmp_path / "sharp", sharp))
    plain, mirrored = (split_moments(sharp)[0][:, side] * SCALE for side in (0, 1))

    def shares(**options):
        images, _ = take(source, 400, **options)
        found = [
            (np.abs(side - image).max((1, 2, 3)) < 1e-4).any()
            for image in images
            for side in (plain, mirrored)
        ]
        found = np.reshape(found, (-1, 2))
        assert (found.sum(1) == 1).all()
        return found.mean(0)

    assert abs(shares()[0] - 0.5) < 0.1
    assert shares(flip=False).tolist() == [1, 0]
    unflippable = dataclasses.replace(source, flip=False)
    assert take(unflippable, 40)[0].shape == (40, 4, 4, 2)


def test_the_stream_is_the_same_for_any_batch_size_process_count_threads_and_restart(cache):
    source = load(cache)
    expected = take(source, 48)
    for options in ({"batch_size": 12}, {"batch_size": 1}, {"num_threads": 3}):
        for name, got in enumerate(take(source, 48, **options)):
            np.testing.assert_array_equal(got, expected[name])
    for name, got in enumerate(take(source, 31, batch_size=1, start=17)):
        np.testing.assert_array_equal(got, expected[name][17:])
    halves = [
        take(source, 24, batch_size=4, process_index=index, process_count=2, num_threads=2)
        for index in (0, 1)
    ]
    # take() counts whole batches, of which each process has a half
    for name in (0, 1):
        parts = [half[name].reshape(-1, 2, *half[name].shape[1:]) for half in halves]
        got = np.concatenate(parts, axis=1).reshape(-1, *expected[name].shape[1:])
        np.testing.assert_array_equal(got, expected[name][: len(got)])


def test_the_noise_of_a_seed_never_changes(tmp_path):
    """Runs are resumed across versions: if this fails, old checkpoints no longer continue exactly."""
    standard = np.zeros((1, 2, 2, 1, 6), np.float32)
    source = load(write_cache(tmp_path / "standard", standard), "train")
    images, _ = take(source, 2, seed=7)
    pinned = [
        [0.431899, 2.7358344, -1.7579368, 0.1850864, 0.1825787, -1.501813],
        [0.594099, 1.2345781, 0.5331838, 1.6076318, 0.470197, -0.5583444],
    ]
    np.testing.assert_allclose(images.reshape(2, -1) / SCALE, pinned, rtol=1e-4)


def test_noise_is_standard_normal(tmp_path):
    standard = np.zeros((1, 2, 16, 16, 8), np.float32)
    source = load(write_cache(tmp_path / "standard", standard))
    drawn = take(source, 1000)[0].astype(np.float64).ravel() / SCALE
    for power, expected in {1: 0, 2: 1, 3: 0, 4: 3}.items():
        assert abs((drawn**power).mean() - expected) < 0.03
    assert 4.5 < np.abs(drawn).max() < 7
    images = drawn.reshape(1000, -1)
    neighbors = np.corrcoef(images[:-1].ravel(), images[1:].ravel())[0, 1]
    halves = np.corrcoef(images[:, :512].ravel(), images[:, 512:].ravel())[0, 1]
    assert max(abs(neighbors), abs(halves)) < 0.01


def test_float16_moments_are_read_as_they_were_rounded(tmp_path, moments):
    rounded = moments.astype(np.float16)
    source = load(write_cache(tmp_path / "half", rounded))
    expected = rounded[4, 0, ..., :2].astype(np.float32) * SCALE
    np.testing.assert_array_equal(source[4]["image"], expected)
    assert take(source, 4)[0].dtype == np.float32


def test_a_source_can_be_sent_to_another_process(cache):
    source = load(cache)
    first = source[9]["image"]
    other = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(other[9]["image"], first)
    assert other.fingerprint == source.fingerprint


def test_the_fingerprint_is_of_the_content(cache, tmp_path, moments):
    again = load(write_cache(tmp_path / "again", moments))
    other = load(write_cache(tmp_path / "other", moments + np.float32(1e-6)))
    known = {load(cache).fingerprint, load(cache, "heldout").fingerprint, other.fingerprint}
    assert len(known) == 3
    assert again.fingerprint == load(cache).fingerprint


def test_a_flipped_byte_never_gives_wrong_numbers(tmp_path):
    moments = random_moments(2, (1, 1, 1))
    directory = write_cache(tmp_path / "small", moments)
    file = directory / "train" / "00000.array_record"
    whole = file.read_bytes()
    expected = moments[:, 0, ..., :1] * SCALE
    # All bytes with content, and some of the padding between them.
    places = [place for place in range(len(whole)) if any(whole[max(place - 8, 0) : place + 8])]
    places += range(1, len(whole), 997)
    damaged = 0
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        source = load(directory)
        for index in range(2):
            try:
                example = source[index]
            except UserError as error:
                damaged += 1
                assert str(error).startswith(f"cannot read image {index} of {file}: ")
                assert "\n" not in str(error)
                assert "run --mode=encode again" in str(error)
            else:
                np.testing.assert_array_equal(example["image"], expected[index])
                assert example["label"] == index
    assert damaged > 2 * 64


def test_a_damaged_record_ends_the_batches_with_one_line(copy):
    file = copy / "train" / "00001.array_record"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read image \d of .*train/00001\.array_record: ") as caught:
        take(load(copy), 100, num_threads=2)
    assert "\n" not in str(caught.value)


def cut(directory):
    file = directory / "train" / "00000.array_record"
    file.write_bytes(file.read_bytes()[:-1000])


def vanish(directory):
    (directory / "train" / "00001.array_record").unlink()


def unfinish(directory):
    (directory / "index.json").rename(directory / "encoding.json")


def flip(directory):
    text = (directory / "index.json").read_text()
    assert "0.5" in text
    (directory / "index.json").write_text(text.replace("0.5", "0.7"))


def edit(**changes):
    """An index that is consistent, but says other things."""

    def change(directory):
        index = json.loads((directory / "index.json").read_text())
        del index["sha256"]
        write_index(
            directory, {name: value for name, value in (index | changes).items() if value is not None}
        )

    return change


SHARD = {"file": "train/00000.array_record", "images": 4, "bytes": 9, "sha256": "", "unreadable": []}
SUMS = {"sums": [], "squares": []}


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "no latents in .*; run --mode=encode first"),
        (unfinish, "are incomplete; run --mode=encode again to finish them"),
        (lambda d: (d / "index.json").write_text("{"), "index.json is corrupt: invalid JSON: "),
        (lambda d: (d / "index.json").write_text("[]"), "index.json is corrupt: invalid JSON: got a list"),
        (lambda d: (d / "index.json").write_bytes(b"\xff"), "index.json is corrupt"),
        (lambda d: (d / "index.json").write_text("[" * 10**5), "index.json is corrupt"),
        (flip, "index.json is corrupt: checksum mismatch"),
        (edit(format=2), "unsupported format of .*index.json: got 2; expected 1"),
        (edit(splits=None), "index.json is corrupt: KeyError: 'splits'"),
        (edit(latents={"shape": [4], "dtype": "float32"}), "index.json is corrupt"),
        (edit(latents={"shape": [4, 4, 2], "dtype": "float64"}), "index.json is corrupt"),
        (edit(autoencoder={"path": "", "fingerprint": ""}), "index.json is corrupt"),
        (edit(pictures=[]), "index.json is corrupt"),
        (edit(splits={"train": [1]}), "index.json is corrupt"),
        (edit(splits={"train": [SHARD]}), "index.json is corrupt"),
        (edit(splits={"train": [SHARD | SUMS | {"images": -1}]}), "index.json is corrupt"),
        (edit(splits={"train": [SHARD | SUMS | {"file": "../x.array_record"}]}), "index.json is corrupt"),
        (
            edit(splits={"train": [SHARD | SUMS]}),
            "has 131,072 bytes; expected 9; run --mode=encode again",
        ),
        (cut, "00000.array_record has 130,072 bytes; expected 131,072"),
        (vanish, "cannot read .*00001.array_record: No such file or directory"),
    ],
)
def test_an_invalid_cache_is_reported_in_one_line(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 8}, "have image_size=4×4; expected config.data.options.image_size=8×8"),
        ({"channels": 4}, "have channels=2; expected config.data.options.channels=4"),
        ({"num_classes": 1000}, "have num_classes=3; expected config.data.options.num_classes=1000"),
    ],
)
def test_unexpected_latents_are_rejected(cache, options, message):
    with pytest.raises(UserError, match=message):
        load(cache, **options)


def settings(**encode):
    tiny = dataclasses.asdict(tiny_settings())
    return config.from_dict(tiny | {"autoencoder": {"path": "mine"}, "encode": {"options": encode}})


@pytest.mark.parametrize(
    "encode, fingerprint, message",
    [
        (
            {},
            "fedcba9876543210",
            r"got fingerprint 0123456789ab \(sd\); expected fedcba987654 .*path=mine",
        ),
        (
            {"image_size": 64},
            None,
            r"were encoded with size=32×32; expected 64×64 \(config.encode.options\)",
        ),
        ({"crop": "celeba"}, None, "were encoded with crop=adm; expected celeba"),
        ({"upright": False}, None, "were encoded with upright=True; expected False"),
    ],
)
def test_latents_of_a_different_autoencoder_resolution_or_crop_are_rejected(
    cache, encode, fingerprint, message
):
    with pytest.raises(ConfigError, match=message):
        check_latents(load(cache), settings(**encode), fingerprint)


def test_latents_that_match_the_config_are_accepted(cache):
    encode = {"path": "/elsewhere", "image_size": 32, "crop": "adm", "upright": True}
    for wanted in (HEADER["autoencoder"]["fingerprint"], None):
        check_latents(load(cache), settings(**encode), wanted)
        check_latents(load(cache), settings(), wanted)


def test_a_missing_path_is_named():
    with pytest.raises(ValueError, match="missing path of the latents source"):
        load_source("latents", "train")
