import dataclasses
import itertools
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.data import batches, epoch, load_source, normalize


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A source whose labels are its indices, and whose images show whether they were mirrored."""

    length: int
    flip: bool = True
    name: str = "numbered"
    split: str = "train"
    image_shape: tuple[int, int, int] = (1, 2, 1)
    num_classes: int = 1
    class_names: tuple[str, ...] = ("0",)
    fingerprint: str = "0"

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": np.array([[[0], [255]]], np.uint8), "label": np.int32(range(self.length)[index])}


def take(source, examples, *, batch_size=8, seed=0, **options):
    """The first examples of a stream: their labels, and whether they were mirrored."""
    options = {"num_threads": 0, "flip": True, **options}
    labels, images = [], []
    with closing(batches(source, batch_size=batch_size, seed=seed, **options)) as stream:
        while len(labels) < examples:
            batch = next(stream)
            labels.extend(batch["label"])
            images.extend(batch["image"])
    return np.array(labels[:examples]), np.array(images[:examples])[:, 0, 0, 0] > 0


lengths, sizes, seeds = st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40)


@given(lengths, sizes, seeds)
@settings(max_examples=50)
def test_every_epoch_is_a_permutation_whatever_the_batch_size(length, batch_size, seed):
    labels, _ = take(Numbered(length), 3 * length, batch_size=batch_size, seed=seed)
    for one_epoch in labels.reshape(3, length):
        assert sorted(one_epoch) == list(range(length))


@given(lengths, sizes, sizes, seeds, st.integers(0, 10**12))
@settings(max_examples=50)
def test_a_run_goes_on_exactly_from_any_count_of_examples(length, before, after, seed, start):
    source = Numbered(length)
    whole = take(source, 2 * before + after, batch_size=before, seed=seed, start=start)
    tail = take(source, after, batch_size=after, seed=seed, start=start + 2 * before)
    for expected, got in zip(whole, tail, strict=True):
        np.testing.assert_array_equal(got, expected[2 * before :])


@given(lengths, st.integers(1, 15), seeds, st.integers(0, 1000), st.sampled_from([2, 4]))
@settings(max_examples=50)
def test_processes_share_the_batches_of_a_single_process(length, share, seed, start, count):
    source, batch_size = Numbered(length), share * count
    options = {"batch_size": batch_size, "seed": seed, "start": start}
    whole = take(source, 3 * batch_size, **options)
    parts = [
        take(source, 3 * share, process_index=index, process_count=count, **options) for index in range(count)
    ]
    for expected, *got in zip(whole, *parts, strict=True):
        union = np.concatenate([part.reshape(3, share) for part in got], axis=1)
        np.testing.assert_array_equal(union, expected.reshape(3, batch_size))


def test_epochs_and_seeds_have_orders_and_flips_of_their_own():
    labels, mirrored = take(Numbered(100), 300)
    orders, flips = labels.reshape(3, 100), np.empty((3, 100), bool)
    for number in range(3):
        flips[number, orders[number]] = mirrored.reshape(3, 100)[number]
    for one, other in itertools.combinations(range(3), 2):
        assert np.sum(orders[one] == orders[other]) < 10
        assert 20 < np.sum(flips[one] == flips[other]) < 80
    for seed in (1, 2**32):
        other_labels, other_mirrored = take(Numbered(100), 100, seed=seed)
        assert np.sum(other_labels == orders[0]) < 10
        assert 20 < np.sum(other_mirrored == mirrored[:100]) < 80


def test_the_stream_of_a_seed_never_changes():
    """Runs are resumed across versions: if this fails, old checkpoints no longer continue exactly."""
    labels, mirrored = take(Numbered(6), 12, seed=7)
    assert labels.tolist() == [4, 3, 2, 1, 0, 5, 3, 5, 0, 1, 4, 2]
    assert mirrored.astype(int).tolist() == [0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1]


def test_half_of_the_images_are_mirrored_and_only_where_their_class_survives_it():
    _, mirrored = take(Numbered(1000), 10_000, batch_size=1000)
    assert abs(mirrored.mean() - 0.5) < 0.02
    assert not take(Numbered(1000), 1000, flip=False)[1].any()
    assert not take(Numbered(1000, flip=False), 1000)[1].any()
    assert not load_source("digits", "train").flip


def test_threads_change_nothing_and_end_with_the_iterator():
    before = set(threading.enumerate())
    source = load_source("fake", "train", image_size=8, length=50)
    options = {"batch_size": 16, "seed": 3, "flip": True}
    with (
        closing(batches(source, **options, num_threads=3, prefetch=5)) as threaded,
        closing(batches(source, **options, num_threads=0)) as plain,
    ):
        for got, expected in zip(itertools.islice(threaded, 20), plain, strict=False):
            np.testing.assert_array_equal(got["image"], expected["image"])
            np.testing.assert_array_equal(got["label"], expected["label"])
        assert set(threading.enumerate()) > before
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "reading threads outlive their iterator"
        time.sleep(0.01)


def test_batches_hold_the_images_of_the_source_in_the_range_of_the_model():
    source = load_source("digits", "train")
    with closing(batches(source, batch_size=8, seed=0)) as stream:
        batch = next(stream)
    assert batch["image"].dtype == np.float32
    assert batch["image"].shape == (8, 8, 8, 1)
    assert batch["label"].dtype == np.int32
    pixels = np.rint((batch["image"].astype(float) + 1) * 127.5).astype(np.uint8)
    for image, label in zip(pixels, batch["label"], strict=True):
        assert label in source.labels[(source.images == image).all((1, 2, 3))]
    np.testing.assert_array_equal(normalize(np.array([0, 255], np.uint8)), np.float32([-1, 1]))


@given(lengths, st.integers(1, 15), st.sampled_from([1, 2, 4]))
@settings(max_examples=50)
def test_an_evaluation_pass_shows_every_example_once_in_batches_of_one_shape(length, share, count):
    passes = [
        list(epoch(Numbered(length), batch_size=share * count, process_index=index, process_count=count))
        for index in range(count)
    ]
    labels = np.array([[batch["label"] for batch in one] for one in passes])  # [process, batch, share]
    mask = np.array([[batch["mask"] for batch in one] for one in passes])
    assert labels.shape == (count, -(-length // (share * count)), share)
    assert sorted(labels[mask]) == list(range(length))
    np.testing.assert_array_equal(labels.swapaxes(0, 1)[mask.swapaxes(0, 1)], np.arange(length))


def test_what_a_source_raises_reaches_the_reader():
    class Broken(Numbered):
        def __getitem__(self, index):
            raise OSError(f"image {index} cannot be read")

    with closing(batches(Broken(3), batch_size=3, seed=0)) as stream, pytest.raises(OSError, match="image"):
        next(stream)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"batch_size": 6, "process_count": 4},
            "invalid batch_size=6; expected a positive multiple of the 4 processes",
        ),
        ({"batch_size": 0}, "invalid batch_size=0; expected a positive multiple"),
        (
            {"process_index": 2, "process_count": 2},
            "invalid process_index=2; expected 0 to process_count - 1 = 1",
        ),
        ({"start": -1}, "invalid seed=0 or start=-1; expected at least 0"),
        ({"seed": -1}, "invalid seed=-1 or start=0; expected at least 0"),
        ({"source": Numbered(0)}, "no images in the 'train' split of data source 'numbered'"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    options = {"source": Numbered(5), "batch_size": 4, "seed": 0, **options}
    with pytest.raises(ValueError, match=message):
        batches(options.pop("source"), **options)
