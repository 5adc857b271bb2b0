from pathlib import Path

import numpy as np
import pytest

from dig_jax.evaluation.moments import Moments
from dig_jax.evaluation.scores import SCORES, FeatureSet, scores_named
from dig_jax.evaluation.scores.inception_score import InceptionScore
from dig_jax.evaluation.scores.kernel import KernelDistance, kernel_distance
from dig_jax.evaluation.scores.mind import SlicedDistance
from dig_jax.evaluation.scores.precision_recall import PrecisionRecall, squared_distances

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")


def feature_set(rows, output="pool"):
    return FeatureSet(len(rows), {output: Moments.of(rows).gaussian}, {output: rows})


@pytest.fixture(scope="module")
def golden():
    return feature_set(GOLDEN["generated"]), feature_set(GOLDEN["reference"])


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_fid_and_precision_and_recall_equal_their_definitions(golden):
    np.testing.assert_allclose(SCORES["fid"](*golden)[""], GOLDEN["fid"], rtol=1e-9)
    figures = SCORES["precision_recall"](*golden)
    assert figures == {"precision": GOLDEN["precision_k3"], "recall": GOLDEN["recall_k3"]}


@pytest.mark.parametrize("size", [100, 400])
def test_the_inception_score_equals_its_definition_for_any_split(size):
    logits = feature_set(GOLDEN["logits"], "logits")
    expected = GOLDEN["inception_score_split100" if size == 100 else "inception_score_all"]
    figures = InceptionScore(split_size=size)(logits, None)
    np.testing.assert_allclose(figures[""], expected, rtol=1e-9)
    assert (figures["std"] == 0) == (size == 400)


def test_the_inception_score_is_the_number_of_balanced_certain_classes_and_one_for_constants():
    certain = feature_set(np.float32(1000 * np.eye(8)[np.arange(80) % 8]), "logits")
    constant = feature_set(np.ones((80, 8), np.float32), "logits")
    for score in (InceptionScore(split_size=40), InceptionScore(split_size=5000)):
        np.testing.assert_allclose(score(certain, None)[""], 8)
        np.testing.assert_allclose(score(constant, None)[""], 1)
    np.testing.assert_allclose(InceptionScore(splits=1)(certain, None)[""], 8)


def test_splits_of_the_inception_score_follow_the_order_only_in_adms_protocol():
    logits = GOLDEN["logits"]
    by_class = logits[np.argsort(logits.argmax(1))]
    figures = [InceptionScore(split_size=100)(feature_set(x, "logits"), None)[""] for x in (logits, by_class)]
    assert figures[1] < 0.9 * figures[0]
    shuffled = InceptionScore(splits=4)(feature_set(by_class, "logits"), None)[""]
    assert shuffled > 1.1 * figures[1]


def test_float16_changes_precision_and_recall_by_less_than_two_thousandths(random):
    rows = [random.normal(size=(1500, 64)).astype(np.float32) * scale for scale in (0.4, 0.45)]
    sets = [feature_set(x) for x in rows]
    exact, half = PrecisionRecall()(*sets), PrecisionRecall(half=True)(*sets)
    assert 0 < exact["precision"] < 1
    for name in exact:
        assert abs(exact[name] - half[name]) <= 2e-3


def test_float16_distances_that_overflow_are_computed_in_float32(golden):
    large = [feature_set(x.rows["pool"] * np.float32(1000)) for x in golden]
    assert not np.isfinite(squared_distances(large[0].rows["pool"], large[1].rows["pool"], np.float16)).all()
    assert PrecisionRecall(half=True)(*large) == PrecisionRecall()(*golden)


def test_a_tight_cluster_of_images_has_precision_without_recall(random):
    """The convention: precision is about generated images, recall about the reference."""
    real = random.normal(size=(500, 4))
    figures = PrecisionRecall()(feature_set(0.1 * random.normal(size=(500, 4))), feature_set(real))
    assert figures["precision"] > 0.8
    assert figures["recall"] < 0.3


def within_three_errors(values, expected):
    return abs(np.mean(values) - expected) < 3 * np.std(values, ddof=1) / np.sqrt(len(values))


def test_kid_of_gaussians_has_closed_forms(random):
    d, n = 8, 250

    def sample(scale=1.0, shift=0.0):
        return shift + scale * random.normal(size=(n, d))

    scaled = [kernel_distance(sample(), sample(0.5)) for _ in range(30)]
    assert within_three_errors(scaled, 3 * (1 - 0.5**2) ** 2 / d)
    shifted = [kernel_distance(sample(), sample(shift=0.4)) for _ in range(30)]
    assert within_three_errors(shifted, 0.655096)
    assert within_three_errors([kernel_distance(sample(), sample()) for _ in range(30)], 0)


def test_kid_uses_fewer_images_per_subset_if_there_are_fewer(golden):
    figures = KernelDistance(subsets=3)(*golden)
    assert figures["subset_size"] == 300
    same = KernelDistance(subsets=3, subset_size=300)(golden[0], golden[0])
    assert same[""] < 0  # unbiased: the same images on both sides


def test_mind_measures_shifts_and_is_a_symmetric_distance(random):
    x = random.normal(size=(300, 64))
    score = SlicedDistance()
    np.testing.assert_allclose(score(feature_set(x), feature_set(x + 1))[""], 192, rtol=0.15)
    y = random.normal(size=(200, 64))
    forward, back = score(feature_set(x), feature_set(y)), score(feature_set(y), feature_set(x))
    assert forward == back
    assert forward["images"] == 200
    assert score(feature_set(x), feature_set(x[::-1]))[""] < 1e-20


@pytest.mark.parametrize("name", ["fid", "precision_recall", "mind"])
def test_scores_do_not_depend_on_the_order_of_images(name, golden):
    shuffled = feature_set(golden[0].rows["pool"][::-1].copy())
    figures, others = SCORES[name](*golden), SCORES[name](shuffled, golden[1])
    value = next(iter(figures))
    # Some BLAS libraries round float32 products of the last rows of a block differently.
    np.testing.assert_allclose(others[value], figures[value], rtol=1e-7 if name == "mind" else 1e-9)


@pytest.mark.parametrize(
    "name, count, expected",
    [("is_torch_fidelity", 9, 10), ("precision_recall", 3, 4), ("kid", 1, 2), ("is", 0, 1)],
)
def test_too_few_images_for_a_score_are_an_error(name, count, expected):
    score = SCORES[name]
    rows = np.zeros((count, 6), np.float32)
    few = FeatureSet(count, {}, {score.output: rows})
    with pytest.raises(ValueError, match=f"got {count}; expected at least {expected}"):
        score(few, few)


def test_missing_features_are_an_error(golden):
    with pytest.raises(ValueError, match="no mean and covariance of 'spatial' features"):
        SCORES["sfid"](*golden)
    statistics = FeatureSet(9, golden[1].gaussians, {})
    with pytest.raises(ValueError, match="no 'pool' features of single images; expected images"):
        SCORES["kid"](golden[0], statistics)


def test_unknown_and_repeated_scores_are_errors():
    assert list(scores_named(("sfid", "fid"))) == ["sfid", "fid"]
    with pytest.raises(ValueError, match="unknown score 'fidd'; expected fid, .*; did you mean 'fid'"):
        scores_named(("fidd",))
    with pytest.raises(ValueError, match="repeated scores: got fid,fid"):
        scores_named(("fid", "fid"))
