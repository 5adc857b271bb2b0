"""FID's Inception network: features against torch-fidelity's, and its published files' three layouts."""

import pickle
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.evaluation.features import inception_features, load_features
from dig_jax.evaluation.features.images import check_images, resize_tf1
from dig_jax.evaluation.features.inception import Inception, _load_once
from dig_jax.files.pytorch.writer import write_torch

GOLDEN = Path(__file__).parent / "golden" / "inception.npz"
LEAVES = {"kernel": "conv.weight", "scale": "bn.weight", "bias": "bn.bias"}
LEAVES |= {"mean": "bn.running_mean", "var": "bn.running_var"}


def shapes_of_parameters():
    network = nnx.eval_shape(Inception)
    return {path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(network))}


def drawn(name, shape):
    """The golden file's parameter of PyTorch's name and shape."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return 0.5 + abs(x)
    if len(shape) > 1:
        return (x * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    return np.float32(0.1) * x + (1 if name.endswith("bn.weight") else 0)


def torch_arrays():
    arrays = {}
    for (*modules, leaf), shape in shapes_of_parameters().items():
        leaf = {"kernel": "weight", "bias": "bias"}[leaf] if modules == ["fc"] else LEAVES[leaf]
        name = ".".join([*modules, leaf])
        turned = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        arrays[name] = drawn(name, turned)
    return arrays


def jax_arrays(arrays):
    """The nested dict of JAX ports."""
    leaves = {"conv.weight": "conv.kernel", "bn.weight": "bn.scale", "fc.weight": "fc.kernel"}
    leaves |= {"running_mean": "mean", "running_var": "var"}
    tree = {}
    for name, array in arrays.items():
        for old, new in leaves.items():
            name = name.replace(old, new)
        *modules, leaf = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return tree


@pytest.fixture(scope="module")
def arrays():
    return torch_arrays()


@pytest.fixture(scope="module")
def weights(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
        for name in arrays
        if name.endswith("running_mean")
    }
    assert len(arrays) == 472
    assert len(arrays | counters) == 566
    write_torch(path, arrays | counters)
    return path


def test_features_are_those_of_torch_fidelity(weights):
    golden = np.load(GOLDEN)
    features = inception_features(golden["images"], weights)
    expected = {
        "pool": golden["pool"],
        "spatial": golden["mixed6_branch1x1_first7"],
        "logits": golden["logits"],
        "logits_unbiased": golden["logits_unbiased"],
    }
    assert set(features) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(features[name], array, rtol=0, atol=2e-5 * np.abs(array).max())


def test_a_pickle_of_a_jax_port_gives_the_same_network(arrays, weights, tmp_path):
    (tmp_path / "inception_v3_weights_fid.pickle").write_bytes(pickle.dumps(jax_arrays(arrays), 4))
    port = load_features("inception", str(tmp_path))
    assert port.weights_hash == _load_once(str(weights)).weights_hash  # kept by inception_features


def test_the_network_has_the_published_size():
    shapes = shapes_of_parameters()
    assert sum(len(shape) == 4 for shape in shapes.values()) == 94
    trained = {path: shape for path, shape in shapes.items() if path[-1] not in ("mean", "var")}
    assert sum(int(np.prod(shape)) for shape in trained.values()) == 23_850_960


def test_dimensions_are_those_of_the_features():
    network = nnx.eval_shape(Inception)
    images = jax.ShapeDtypeStruct((3, 20, 30, 3), jnp.uint8)
    features = jax.eval_shape(lambda network, images: network(images), network, images)
    assert {name: feature.shape for name, feature in features.items()} == {
        name: (3, size) for name, size in network.dimensions.items()
    }
    assert network.dimensions == {"pool": 2048, "spatial": 2023, "logits": 1008, "logits_with_bias": 1008}


@pytest.mark.parametrize(("height", "width"), [(7, 5), (4, 12), (1, 1), (9, 9)])
def test_resizing_reads_two_neighbors_without_a_half_pixel_offset(height, width):
    """Against the definition, pixel by pixel."""
    image = np.random.default_rng(0).uniform(0, 255, (height, width))
    result = resize_tf1(jnp.asarray(image[None, :, :, None], jnp.float32), 9)[0, :, :, 0]
    for i in range(9):
        for j in range(9):
            y, x = i * height / 9, j * width / 9
            rows, columns = ([int(p), min(int(p) + 1, n - 1)] for p, n in ((y, height), (x, width)))
            pixels = image[np.ix_(rows, columns)]
            expected = np.array([1 - y % 1, y % 1]) @ pixels @ np.array([1 - x % 1, x % 1])
            assert abs(result[i, j] - expected) < 1e-3


def test_images_of_the_network_s_size_are_not_changed():
    images = np.random.default_rng(0).uniform(0, 255, (1, 299, 299, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_tf1(jnp.asarray(images), 299), images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 1), np.uint8), "invalid images of shape [1, 8, 8, 1]"),
        (np.zeros((8, 8, 3), np.uint8), "invalid images of shape [8, 8, 3]"),
        (np.zeros((1, 8, 8, 3), np.int32), "invalid images of dtype int32; expected uint8"),
    ],
)
def test_images_that_are_not_rgb_pixels_are_errors(images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_images(jnp.asarray(images))


@pytest.mark.parametrize("source", ["", "nowhere.pth", "."])
def test_missing_weights_say_where_to_get_them(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_features("inception", source)
    message = str(caught.value)
    assert "inception: no " in message
    assert "fid_weights/pt_inception-2015-12-05-6726825d.pth (96 MB)" in message
    assert "\n" not in message


def test_an_unknown_network_is_an_error():
    with pytest.raises(ConfigError, match="unknown feature network 'inceptoin'; did you mean 'inception'"):
        load_features("inceptoin", "")


def test_a_file_with_another_hash_in_its_name_is_corrupt(tmp_path):
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    write_torch(path, {"fc.bias": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError, match="checksum mismatch with the file's name; download it again"):
        load_features("inception", str(path))
