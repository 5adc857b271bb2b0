import functools
import json

import numpy as np
import pytest
from fake_features import DIMENSIONS, fake_network, random_images
from PIL import Image

from dig_jax.errors import UserError
from dig_jax.evaluation.feature_scores import collect, needs_of
from dig_jax.evaluation.references import load_reference, read_reference
from dig_jax.evaluation.scores import SCORES
from dig_jax.testing import tiny_components

IMAGES = random_images(3, 30)
SHAPE = (8, 8, 3)
OPTIONS = {"image_size": 8, "channels": 3, "num_classes": 5, "length": 60}


def reference(text, *scores, shape=SHAPE, source="", cache=None):
    needs = needs_of({name: SCORES[name] for name in scores or ("fid", "kid")})
    networks = {name: fake_network(name, source) for name in needs}
    components = tiny_components(data__options=OPTIONS)
    collecting = functools.partial(collect, folder=None)
    return read_reference(str(text), components, shape, networks, needs, collecting, cache)


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=IMAGES)
    return path


def statistics(path, images=None, **changes):
    """Write what ADM's evaluator publishes."""
    features = reference(images, "fid", "sfid").features["inception"] if images else None
    arrays = {}
    for output, (mean, covariance) in {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}.items():
        d = DIMENSIONS[output]
        arrays[mean] = features.gaussians[output].mean if features else np.zeros(d)
        arrays[covariance] = features.gaussians[output].covariance if features else np.eye(d)
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for output, gaussian in b[name].gaussians.items():
            np.testing.assert_allclose(a[name].gaussians[output].covariance, gaussian.covariance, rtol=1e-9)
        for output, rows in b[name].rows.items():
            np.testing.assert_array_equal(a[name].rows[output], rows)


def test_a_folder_an_npz_file_and_a_source_of_the_same_images_agree(images, tmp_path):
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number:03}.png")
    expected = reference(images)
    assert_same(reference(tmp_path / "folder").features, expected.features)
    split = reference("train")
    assert split.description["images"] == 60
    assert split.description["name"] == "train split of fake"


def test_adm_statistics_are_used_as_they_are_and_their_images_for_single_images(images, tmp_path):
    computed = reference(images, "fid", "sfid", "kid").features["inception"]
    path = statistics(tmp_path / "adm.npz", images, mu=np.full(6, 5.0, np.float32), arr_0=IMAGES[:9])
    found = reference(path, "fid", "sfid", "kid").features["inception"]
    np.testing.assert_array_equal(found.gaussians["pool"].mean, np.full(6, 5.0))
    np.testing.assert_array_equal(
        found.gaussians["spatial"].covariance, computed.gaussians["spatial"].covariance
    )
    assert found.rows["pool"].shape == (9, 6)
    # DINOv2's statistics are not published: they are computed from the images.
    assert reference(path, "fid", "fd_dinov2").features["dinov2_vitl14"].count == 9


def test_computed_features_are_kept_and_used_again_for_the_same_images_only(images, tmp_path, monkeypatch):
    cache = tmp_path / "reference.npz"
    first = reference(images, cache=cache)
    assert_same(reference(cache).features, first.features)  # the file is a reference itself
    assert reference(cache).description["hash"] == first.description["hash"]
    cached = reference(images, cache=cache)
    assert_same(cached.features, first.features)
    np.savez(images, arr_0=IMAGES[::2])
    assert reference(images, cache=cache).description["images"] == 15
    assert reference(images, source="others", cache=cache).features["inception"].count == 15


def test_a_reference_of_other_weights_size_or_scores_is_refused(images, tmp_path):
    cache = tmp_path / "reference.npz"
    reference(images, "fid", cache=cache)
    with pytest.raises(UserError, match=r"reference=.* has features of inception with weights hash of"):
        reference(cache, "fid", source="others")
    with pytest.raises(UserError, match=r"has images of 8×8 px and 3 channels; expected 16×16 px and 3"):
        reference(cache, "fid", shape=(16, 16, 3))
    with pytest.raises(UserError, match=r"lacks inception features pool: got pool; compute the reference"):
        reference(cache, "kid")
    with pytest.raises(UserError, match="has features of no dinov2_vitl14; expected dinov2_vitl14 with"):
        reference(cache, "fd_dinov2")
    with pytest.raises(UserError, match=r"npz has images of 8×8 px and 3 channels; expected 8×8 px and 1 c"):
        reference(images, shape=(8, 8, 1))


@pytest.mark.parametrize(
    "changes, scores, message",
    [
        (
            {"mu": np.zeros(7)},
            ["fid"],
            r"invalid mu and sigma in .*: got shapes \(7,\) and \(6, 6\)",
        ),
        ({"sigma_s": np.full((4, 4), np.nan)}, ["sfid"], "invalid mu_s or sigma_s in .*: not finite"),
        ({}, ["kid"], "has statistics but no images; scores of single images, such as kid"),
        ({"arr_0": IMAGES[:, :4]}, ["kid"], "has images of 4×8 px and 3 channels; expected 8×8 px"),
    ],
    ids=["length", "NaN", "no images", "size of images"],
)
def test_invalid_statistics_are_one_line(changes, scores, message, tmp_path):
    with pytest.raises(UserError, match=message):
        reference(statistics(tmp_path / "adm.npz", **changes), *scores)


def test_statistics_without_spatial_features_give_no_sfid(tmp_path):
    path = statistics(tmp_path / "adm.npz", mu_s=None, sigma_s=None)
    features = reference(path, "fid", "sfid").features["inception"]
    with pytest.raises(ValueError, match="no mean and covariance of 'spatial' features"):
        SCORES["sfid"](features, features)


def test_damaged_references_are_one_line(images, tmp_path):
    cache = tmp_path / "reference.npz"
    reference(images, cache=cache)
    with np.load(cache) as arrays:
        stored = dict(arrays)
    changed = stored | {"inception/mean/pool": stored["inception/mean/pool"] + 1}
    np.savez(cache, **changed)
    with pytest.raises(UserError, match="damaged .*reference.npz: wrong checksum"):
        reference(cache)
    for text in ("no JSON", json.dumps({"shape": [8, 8, 3]}), json.dumps([1])):
        np.savez(cache, **stored | {"reference": np.array(text)})
        with pytest.raises(UserError, match="damaged .*reference.npz: "):
            reference(cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[:200])
    with pytest.raises(UserError, match="damaged .*expected an npz file"):
        reference(cache)
    assert reference(images, cache=cache).features  # a damaged cache is computed again
    assert load_reference(cache, SHAPE, {}, {}).features == {}


def test_a_missing_reference_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="no such folder or file; expected train, heldout, a folder"):
        reference(tmp_path / "nothing.npz")
