import jax
import numpy as np
import pytest
from fake_features import DIMENSIONS, fake_network, random_images

from dig_jax.evaluation import collection as collections
from dig_jax.evaluation import store as stores
from dig_jax.evaluation.collection import Collection, Collector, Outputs, merged
from dig_jax.evaluation.scores import SCORES
from dig_jax.evaluation.store import Store
from dig_jax.parallel.mesh import AXES

COUNT = 150
OUTPUTS = Outputs.of([SCORES["fid"], SCORES["kid"], SCORES["is"]])
IMAGES = random_images(0, COUNT)


def collected(order=None, size=40):
    """Collect features of IMAGES in an order, `size` at a time."""
    collector = Collector(fake_network(), OUTPUTS)
    order = np.arange(COUNT) if order is None else order
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        collector.add(chosen, IMAGES[chosen])
    return collector.collection


def assert_same(a, b):
    a, b = a.feature_set(), b.feature_set()
    assert a.count == b.count
    for name, rows in b.rows.items():
        np.testing.assert_array_equal(a.rows[name], rows)
    for name, gaussian in b.gaussians.items():
        np.testing.assert_allclose(a.gaussians[name].mean, gaussian.mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(a.gaussians[name].covariance, gaussian.covariance, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def expected():
    return collected(size=COUNT)


def test_outputs_are_kept_as_moments_or_for_single_images():
    assert OUTPUTS.moments == {"pool"}
    assert OUTPUTS.rows == {"pool", "logits"}
    found = collected().feature_set()
    assert {name: rows.shape for name, rows in found.rows.items()} == {
        name: (COUNT, DIMENSIONS[name]) for name in OUTPUTS.rows
    }
    direct = fake_network()(IMAGES)["pool"]
    np.testing.assert_allclose(found.rows["pool"], direct, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 128])
def test_batch_size_changes_nothing(size, expected):
    assert_same(collected(size=size), expected)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_number_of_devices_changes_nothing(devices, expected, monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(-1, 1, 1, 1), AXES)
    monkeypatch.setattr(collections, "local_mesh", lambda: mesh)
    assert_same(collected(), expected)


def test_order_of_images_changes_nothing(expected):
    assert_same(collected(np.random.default_rng(0).permutation(COUNT)), expected)


def test_how_often_moments_are_updated_changes_nothing(expected, monkeypatch):
    monkeypatch.setattr(collections, "_UPDATE_EVERY", 16)
    assert_same(collected(size=10), expected)


def test_two_processes_collect_what_one_does(expected):
    shares = [collected(np.arange(COUNT)[index::2]) for index in range(2)]
    sent = [Collection.from_arrays(share.arrays()) for share in shares]
    assert_same(merged(sent), expected)
    assert_same(merged(sent[::-1]), expected)


def test_an_interrupted_collection_resumes_to_the_same_features(tmp_path, expected, monkeypatch):
    def start():
        collector = Collector(fake_network(), OUTPUTS)
        store = Store(tmp_path / "features.npz", {"images": "abc"})
        return collector, store, store.load({"inception": collector})

    monkeypatch.setattr(stores, "_SAVE_EVERY", -1)
    collector, store, first = start()
    assert first == 0
    for begin in (0, 30, 60):
        store.save_if_due({"inception": collector})
        collector.add(np.arange(begin, begin + 30), IMAGES[begin : begin + 30])
    collector, _, first = start()  # after a kill
    assert first == 60
    for begin in range(40, COUNT, 30):  # images that are there already do not count twice
        stop = min(begin + 30, COUNT)
        collector.add(np.arange(begin, stop), IMAGES[begin:stop])
    assert_same(collector.collection, expected)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 damaged", None], ids=["empty", "damaged", "others"])
def test_a_file_of_something_else_is_ignored(content, tmp_path):
    path = tmp_path / "features.npz"
    collector = Collector(fake_network(), OUTPUTS)
    collector.add(np.arange(5), IMAGES[:5])
    if content is None:
        Store(path, {"images": "others"}).save({"inception": collector.collection})
    else:
        path.write_bytes(content)
    fresh = Collector(fake_network(), OUTPUTS)
    assert Store(path, {"images": "these"}).load({"inception": fresh}) == 0


def test_gray_images_are_scored_as_rgb():
    gray = random_images(1, 5, channels=1)
    one, three = (Collector(fake_network(), OUTPUTS) for _ in range(2))
    one.add(np.arange(5), gray)
    three.add(np.arange(5), np.repeat(gray, 3, axis=-1))
    assert_same(one.collection, three.collection)


def test_features_that_are_not_finite_name_the_image():
    features = {name: np.zeros((3, DIMENSIONS[name]), np.float32) for name in OUTPUTS.names}
    features["logits"][1, 4] = np.nan
    with pytest.raises(ValueError, match="invalid 'logits' features of image 8: not finite"):
        Collection.none(OUTPUTS, DIMENSIONS).with_features(np.array([7, 8, 9]), features)
