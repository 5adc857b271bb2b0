"""Scores beside SciPy and torch-fidelity, on generated features.

torch-fidelity is no dependency; install it in an environment of its own, with PyTorch, to run its tests.
"""

import numpy as np
import pytest

from dig_jax.evaluation.moments import Moments, distance
from dig_jax.evaluation.scores import SCORES, FeatureSet

LENGTH = 64


def features(seed, count, scale):
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(LENGTH, LENGTH)) / np.sqrt(LENGTH)
    return np.abs(scale * random.normal(size=(count, LENGTH)) @ mixing + 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    return features(0, 1200, 1.0), features(1, 1100, 1.1)


@pytest.fixture(scope="module")
def sets(rows):
    return tuple(FeatureSet(len(x), {"pool": Moments.of(x).gaussian}, {"pool": x, "logits": x}) for x in rows)


def test_the_frechet_distance_equals_that_by_a_matrix_square_root(sets):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (one.gaussians["pool"] for one in sets)
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root)
    np.testing.assert_allclose(distance(a, b), np.sum((a.mean - b.mean) ** 2) + traces, rtol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_torch_fidelity(rows, sets):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    a, b = map(torch.from_numpy, rows)
    expected = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(x) for x in (a, b)), verbose=False
    )
    expected |= metric_isc.isc_features_to_metric(a)
    expected |= metric_kid.kid_features_to_metric(a, b, verbose=False)
    expected |= metric_prc.prc_features_to_metric(a, b, verbose=False)
    names = {
        "frechet_inception_distance": ("fid", "fid"),
        "inception_score_mean": ("is_torch_fidelity", "is_torch_fidelity"),
        "inception_score_std": ("is_torch_fidelity", "is_torch_fidelity_std"),
        "kernel_inception_distance_mean": ("kid", "kid"),
        "kernel_inception_distance_std": ("kid", "kid_std"),
        "precision": ("precision_recall", "precision"),
        "recall": ("precision_recall", "recall"),
    }
    figures = {}
    for score in dict.fromkeys(score for score, _ in names.values()):
        figures |= SCORES[score].figures(score, *sets)
    for theirs, (_, ours) in names.items():
        np.testing.assert_allclose(figures[ours], expected[theirs], rtol=1e-5, atol=1e-5, err_msg=ours)
