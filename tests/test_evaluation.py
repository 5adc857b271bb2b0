from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.data import load_source
from dig_jax.evaluation import frechet_distance, nearest_training_images, score_digits

GOLDEN = Path(__file__).parent / "golden"


def normal(seed, count, length):
    random = np.random.default_rng(seed)
    return random.normal(size=(count, length)) @ random.normal(size=(length, length))


def test_frechet_distance_equals_the_definition_by_brute_force():
    golden = np.load(GOLDEN / "metrics.npz")
    distance = frechet_distance(golden["generated"], golden["reference"])
    np.testing.assert_allclose(distance, golden["fid"], rtol=1e-9)


# Fewer vectors than dimensions make the covariances singular.
sets = st.tuples(st.integers(0, 2**32), st.integers(2, 12), st.integers(2, 12), st.integers(1, 6))


@given(sets)
def test_frechet_distance_is_symmetric_and_zero_for_itself(case):
    seed, n, m, length = case
    a, b = normal([seed, 0], n, length), normal([seed, 1], m, length)
    assert frechet_distance(a, a) <= 1e-12 * a.var(0).sum() * n
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-9)


@given(sets, st.floats(-100, 100))
def test_frechet_distance_under_translation_scaling_and_rotation(case, shift):
    seed, n, m, length = case
    a, b = normal([seed, 0], n, length), normal([seed, 1], m, length)
    rotation, _ = np.linalg.qr(normal([seed, 2], length, length))
    distance, size = frechet_distance(a, b), (a**2).sum() + (b**2).sum() + shift**2
    assert abs(frechet_distance(a + shift, b + shift) - distance) <= 1e-12 * size
    assert abs(frechet_distance(a @ rotation, b @ rotation) - distance) <= 1e-12 * size
    assert abs(frechet_distance(3 * a, 3 * b) - 9 * distance) <= 1e-11 * size
    assert abs(frechet_distance(a, a + shift) - length * shift**2) <= 1e-11 * size


def test_frechet_distance_has_the_closed_form_of_independent_gaussians():
    """|Δμ|² + Σ (σa - σb)² when both covariances are diagonal."""
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # unbiased covariance I
    a, b = [5.0, 1.0] + signs * [2.0, 0.5], [1.0, -2.0] + signs * [0.25, 7.0]
    np.testing.assert_allclose(frechet_distance(a, b), 4**2 + 3**2 + 1.75**2 + 6.5**2)


@pytest.mark.parametrize(
    "n, m, length, message",
    [(1, 5, 3, "expected at least 2 per set"), (5, 5, 2, "got 3 and 2; expected equal")],
)
def test_frechet_distance_names_invalid_features(n, m, length, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(np.zeros((n, 3)), np.zeros((m, length)))


@pytest.fixture(scope="module")
def heldout():
    return load_source("digits", "heldout")


@pytest.fixture(scope="module")
def train():
    return load_source("digits", "train")


def test_the_classifier_recognizes_real_digits(heldout):
    scores = score_digits(heldout.images, heldout.labels)
    assert scores["accuracy"] == scores["classifier_heldout_accuracy"] >= 0.97
    assert scores["frechet_distance"] < 1e-12
    assert scores["nearest_distance_generated"] == scores["nearest_distance_heldout"]


def test_training_images_score_as_real_images_do(train):
    scores = score_digits(train.images, train.labels)
    assert scores["accuracy"] > 0.99
    assert scores["frechet_distance"] == pytest.approx(scores["frechet_distance_real"])
    assert scores["num_images"] == scores["num_train_images"] == 1437


def test_copies_have_zero_distance_to_the_training_set(train):
    scores = score_digits(train.images[::3], train.labels[::3])
    assert scores["nearest_distance_generated"] == 0 < 1 < scores["nearest_distance_heldout"]
    assert scores["frechet_distance_real"] < scores["frechet_distance_real_same_size"]


def test_scores_detect_wrong_labels_noise_and_lack_of_variety(heldout):
    real = score_digits(heldout.images, heldout.labels)["frechet_distance_real"]
    assert score_digits(heldout.images, (heldout.labels + 1) % 10)["accuracy"] < 0.02
    noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 1), np.uint8)
    scores = score_digits(noise, np.arange(500) % 10)
    assert scores["accuracy"] < 0.2
    assert scores["frechet_distance"] > 20 * real
    first = np.array([np.flatnonzero(heldout.labels == label)[0] for label in range(10)]).repeat(36)
    scores = score_digits(heldout.images[first], heldout.labels[first])
    assert scores["accuracy"] > 0.9
    assert scores["frechet_distance"] > 5 * real


def test_enlarged_digits_are_scored_among_digits_of_their_size():
    small, large = (load_source("digits", "heldout", image_size=size) for size in (8, 32))
    assert large.image_shape == (32, 32, 1)
    assert large.fingerprint != small.fingerprint
    scores = score_digits(large.images, large.labels)
    assert scores["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert scores["accuracy"] == scores["classifier_heldout_accuracy"] > 0.97
    assert scores["heldout_fingerprint"] == large.fingerprint


@given(st.integers(0, 2**32))
@settings(max_examples=10)
def test_nearest_training_images_are_the_nearest(seed):
    images = np.random.default_rng(seed).integers(0, 256, (5, 8, 8, 1), np.uint8)
    train = load_source("digits", "train").images.astype(float)
    distances = np.sqrt(((images[:, None] - train) ** 2).sum((2, 3, 4))) / 127.5
    indices, nearest = nearest_training_images(images)
    np.testing.assert_allclose(nearest, distances.min(1))
    np.testing.assert_allclose(distances[np.arange(5), indices], distances.min(1))


@pytest.mark.parametrize(
    "count, labels, message",
    [
        (3, [0, 1], "differ: got 3 and 2"),
        (1, [0], "got 1; expected at least 2"),
        (2, [0, 10], "got 0 … 10; expected 0 … 9"),
        (2, [-1, 3], "got -1 … 3; expected 0 … 9"),
    ],
)
def test_a_score_names_invalid_arguments(count, labels, message):
    with pytest.raises(ValueError, match=message):
        score_digits(np.zeros((count, 8, 8, 1), np.uint8), np.array(labels))
