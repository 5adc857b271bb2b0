"""DINOv2's features against transformers', from its published files' two layouts, and its preprocessing."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.evaluation.features import load_features
from dig_jax.evaluation.features.dinov2 import (
    _IGNORED,
    ARCHITECTURES,
    Architecture,
    Dinov2,
    layouts,
    resize_table,
)
from dig_jax.evaluation.features.images import resize_bicubic, resize_pillow
from dig_jax.evaluation.features.weights import load_weights
from dig_jax.files.pytorch.writer import write_torch

SMALL = Architecture(width=32, depth=3, heads=2, size=42, table=3)


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "dinov2.npz")


def drawn(name, shape):
    """The golden file's parameter of the Hub's name."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("norm1.weight", "norm2.weight", "layernorm.weight")):
        x = 1 + 0.1 * x
    elif name.endswith("lambda1"):
        x = 0.5 + 0.1 * x
    elif name.endswith(".weight"):
        x = x * np.sqrt(1 / np.prod(shape[1:]))
    else:
        x = (0.5 if "embeddings" in name else 0.1) * x
    return x.astype(np.float32)


def hub_shapes(a):
    """Names and shapes of the Hub's file, written down from transformers' modules."""
    w = a.width
    shapes = {
        "embeddings.cls_token": (1, 1, w),
        "embeddings.mask_token": (1, w),
        "embeddings.position_embeddings": (1, 1 + a.table**2, w),
        "embeddings.patch_embeddings.projection.weight": (w, 3, a.patch, a.patch),
        "embeddings.patch_embeddings.projection.bias": (w,),
        "layernorm.weight": (w,),
        "layernorm.bias": (w,),
    }
    linear = {f"attention.attention.{part}": (w, w) for part in ("query", "key", "value")}
    linear |= {"attention.output.dense": (w, w), "mlp.fc1": (4 * w, w), "mlp.fc2": (w, 4 * w)}
    for block in range(a.depth):
        for name, shape in (linear | {"norm1": (w,), "norm2": (w,)}).items():
            shapes[f"encoder.layer.{block}.{name}.weight"] = shape
            shapes[f"encoder.layer.{block}.{name}.bias"] = shape[:1]
        for scale in ("layer_scale1", "layer_scale2"):
            shapes[f"encoder.layer.{block}.{scale}.lambda1"] = (w,)
    return shapes


def hub_arrays(a=SMALL):
    return {name: drawn(name, shape) for name, shape in hub_shapes(a).items()}


def original_arrays(hub):
    """The same arrays with the names of the released code."""
    renamed = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.": "",
        "encoder.layer": "blocks",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm": "norm",
    }
    arrays = {}
    for name, array in hub.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        arrays[name] = array
    for name in [name for name in arrays if ".attention.attention.query." in name]:
        parts = [arrays.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        arrays[name.replace("attention.attention.query", "attn.qkv")] = np.concatenate(parts)
    return arrays


def read(path, a=SMALL):
    return load_weights(nnx.eval_shape(lambda: Dinov2("small", a)), path, layouts(a), _IGNORED)


@pytest.fixture
def path(tmp_path):
    save_file(hub_arrays(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_class_token_is_that_of_transformers(golden, path):
    result = jax.jit(Dinov2.encode)(read(path), golden["pixels"])
    np.testing.assert_allclose(result, golden["cls"], rtol=0, atol=2e-5)


def test_the_class_token_is_that_of_the_released_code(golden, tmp_path):
    """From the shape of its files to the resized positions."""
    architecture = Architecture(width=32, depth=2, heads=2)
    arrays = {}
    for name, array in original_arrays(hub_arrays(architecture)).items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(array.shape)
        arrays[name] = np.float32(x * (0.3 if array.ndim < 2 else array.shape[-1] ** -0.5))
    write_torch(tmp_path / "dinov2_small_pretrain.pth", arrays)
    pixels = np.random.default_rng(0).standard_normal((1, 224, 224, 3)).astype(np.float32)
    network = read(tmp_path / "dinov2_small_pretrain.pth", architecture)
    np.testing.assert_allclose(jax.jit(Dinov2.encode)(network, pixels), golden["released"], atol=2e-6)


def test_files_of_the_released_code_give_the_same_network(path, tmp_path):
    write_torch(tmp_path / "original.pth", original_arrays(hub_arrays()))
    network, original = read(path), read(tmp_path / "original.pth")
    assert network.weights_hash == original.weights_hash
    assert jax.tree.all(jax.tree.map(np.array_equal, *(nnx.state(n) for n in (network, original))))


def test_the_hash_tells_weights_apart(path, tmp_path):
    arrays = hub_arrays()
    arrays["layernorm.bias"][0] += 1
    save_file(arrays, tmp_path / "other.safetensors")
    assert read(path).weights_hash != read(tmp_path / "other.safetensors").weights_hash


def test_positions_are_resized_as_in_the_released_code(golden):
    np.testing.assert_allclose(resize_table(golden["positions"], 16), golden["positions16"], atol=1e-6)


def test_edm2_resizes_like_pytorch_s_anti_aliased_bicubic(golden):
    image = jnp.asarray(golden["image"], jnp.float32)
    np.testing.assert_allclose(resize_bicubic(image, 24), golden["antialiased24"], atol=1e-3)
    np.testing.assert_allclose(resize_bicubic(image[:, :10, :9], 24), golden["enlarged24"], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 80), (20, 30), (48, 48)])
def test_dgm_eval_resizes_like_pillow(height, width):
    images = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), np.uint8)
    result = np.asarray(resize_pillow(jnp.asarray(images, jnp.float32), 48))
    expected = [Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC) for image in images]
    difference = np.abs(result - np.stack(expected))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("preprocessing", ["edm2", "dgm_eval"])
def test_images_are_normalized_with_imagenet_s_colors(path, preprocessing):
    network = read(path)
    network.resize = preprocessing
    color = np.uint8([120, 10, 250])
    pixels = (color / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = network.encode(jnp.broadcast_to(jnp.float32(pixels), (1, 42, 42, 3)))
    result = network(jnp.broadcast_to(jnp.asarray(color), (1, 20, 50, 3)))["cls"]
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "width"),
    [("dinov2_vitl14", 304_368_640, 1024), ("dinov2_vitb14", 86_580_480, 768)],
)
def test_the_networks_have_the_published_sizes(name, parameters, width):
    """The published count includes the mask token and all 37 × 37 positions; ours has 16 × 16."""
    shapes = hub_shapes(ARCHITECTURES[name])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    network = nnx.eval_shape(lambda: Dinov2(name, ARCHITECTURES[name]))
    ours = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(network)))
    assert ours == parameters - width - (37**2 - 16**2) * width
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.uint8)
    features = jax.eval_shape(lambda network, images: network(images), network, images)
    assert {name: feature.shape for name, feature in features.items()} == {"cls": (2, width)}
    assert network.dimensions == {"cls": width}


def changed(**arrays):
    return hub_arrays() | {name.replace("__", "."): array for name, array in arrays.items()}


BAD = {
    "missing": (
        lambda: {k: v for k, v in hub_arrays().items() if k != "layernorm.bias"},
        "arrays of another network; missing: layernorm.bias",
    ),
    "unexpected": (lambda: changed(head=np.zeros(2, np.float32)), "network; unexpected: head"),
    "another_width": (
        lambda: changed(layernorm__bias=np.zeros(31, np.float32)),
        "layernorm.bias has shape [31], which gives [31]; expected [32]",
    ),
    "another_table": (
        lambda: changed(embeddings__position_embeddings=np.zeros((1, 17, 32), np.float32)),
        "embeddings.position_embeddings has shape [1, 17, 32], which does not fit the network",
    ),
    "one_layer_of_another_width": (
        lambda: changed(encoder__layer__1__norm1__bias=np.zeros(31, np.float32)),
        "encoder.layer.0.norm1.bias has shape [32], which does not fit the network",
    ),
    "integers": (
        lambda: changed(layernorm__bias=np.zeros(32, np.int64)),
        "layernorm.bias is int64; expected float32, float16, bfloat16, float64",
    ),
    "nan": (
        lambda: changed(layernorm__bias=np.full(32, np.nan, np.float32)),
        "layernorm.bias has non-finite values",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_weights_of_another_network_give_one_line(kind, tmp_path):
    arrays, message = BAD[kind]
    save_file(arrays(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "model.safetensors")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_larger_network_s_weights_are_refused(path):
    with pytest.raises(CheckpointError, match=r"another network; missing: encoder\.layer\.10\.attention.* …"):
        load_features("dinov2_vitb14", str(path))


def test_an_unknown_preprocessing_is_an_error(path):
    with pytest.raises(ConfigError, match="unknown preprocessing 'edm'; did you mean 'edm2'"):
        load_features("dinov2_vitb14", str(path), preprocessing="edm")
    with pytest.raises(ConfigError, match="invalid preprocessing 'edm2': inception has one kind only"):
        load_features("inception", str(path), preprocessing="edm2")


def test_missing_weights_say_where_to_get_them():
    with pytest.raises(
        ConfigError, match=r"facebook/dinov2-large/resolve/main/model.safetensors \(1,218 MB\)"
    ):
        load_features("dinov2_vitl14", "")


def test_files_come_from_the_hub_by_name(path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if file != "model.safetensors":
            raise OSError("offline")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError, match="another network"):  # the file was found
        load_features("dinov2_vitb14", "facebook/dinov2-base")
    with pytest.raises(ConfigError, match=r"no such file: .*\(offline\); download https"):
        load_features("dinov2_vitb14", "facebook/dinov2-base/other.bin")
    assert asked == [
        ("facebook/dinov2-base", "model.safetensors"),
        ("facebook/dinov2-base", "other.bin"),
    ]
