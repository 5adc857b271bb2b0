"""The scores that other programs call with arrays: `dig_jax.evaluation`."""

from pathlib import Path

import numpy as np
import pytest

from dig_jax.evaluation import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    mind,
    precision_recall,
)


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "metrics.npz")


def test_precision_and_recall_are_the_golden_ones(golden):
    precision, recall = precision_recall(golden["reference"], golden["generated"], k=3)
    assert precision == pytest.approx(golden["precision_k3"], abs=1e-9)
    assert recall == pytest.approx(golden["recall_k3"], abs=1e-9)


def test_the_inception_score_in_splits_is_the_golden_one(golden):
    assert inception_score(golden["logits"]) == pytest.approx(golden["inception_score_all"], rel=1e-6)
    in_splits = inception_score(golden["logits"], splits=4)
    assert in_splits == pytest.approx(golden["inception_score_split100"], rel=1e-6)


def test_the_protocols_differ_only_in_how_they_split(golden):
    adm, torch_fidelity = (
        inception_score(golden["logits"], splits=1, protocol=name) for name in ("adm", "torch_fidelity")
    )
    assert adm == pytest.approx(torch_fidelity, rel=1e-9)
    assert inception_score(golden["logits"], protocol="torch_fidelity") < adm  # 10 splits


@pytest.mark.parametrize("splits", [0, 401])
def test_splits_without_images_are_an_error(golden, splits):
    with pytest.raises(ValueError, match=f"invalid splits={splits} of 400 images; expected 1 to 400"):
        inception_score(golden["logits"], splits=splits)


def test_adms_protocol_gives_the_splits_that_were_asked_for_or_names_those_that_it_gives():
    logits = np.random.default_rng(0).standard_normal((10, 3))
    for splits in (1, 2, 3, 4, 5, 10):
        parts = [logits[i : i + -(-10 // splits)] for i in range(0, 10, -(-10 // splits))]
        assert len(parts) == splits
        expected = np.mean([inception_score(part) for part in parts])
        assert inception_score(logits, splits=splits) == pytest.approx(expected)
    with pytest.raises(ValueError, match="invalid splits=6 of 10 images: got 5 splits of at most 2 each"):
        inception_score(logits, splits=6)
    assert inception_score(logits, splits=6, protocol="torch_fidelity") > 1
    many = np.tile(logits, (5000, 1))
    assert inception_score(many) == inception_score(many, splits=10)  # 50,000 images, as published


def test_an_unknown_protocol_is_an_error(golden):
    with pytest.raises(ValueError, match="unknown protocol 'fid'; expected adm or torch_fidelity"):
        inception_score(golden["logits"], protocol="fid")


def test_a_frechet_distance_of_merged_moments_is_that_of_the_features(golden):
    reference, generated = golden["reference"], golden["generated"]
    merged = Moments.of(generated[:100]) + Moments.of(generated[100:])
    assert frechet_distance(Moments.of(reference), merged) == pytest.approx(golden["fid"], rel=1e-9)
    assert frechet_distance(reference, merged) == pytest.approx(golden["fid"], rel=1e-9)


def test_distances_of_a_set_from_itself_and_from_a_shifted_one(golden):
    features = golden["reference"].astype(np.float64)
    assert mind(features, features) == 0
    length = features.shape[1]
    assert mind(features, features + 1) == pytest.approx(3 * length, rel=0.1)
    assert kernel_distance(features, features + 1) > kernel_distance(features[::2], features[1::2])
