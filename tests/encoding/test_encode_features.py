"""--mode=encode with `encode.features`: features of the images that the latents belong to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from encoded_images import pictures, settings
from flax import nnx

from dig_jax.cli.commands import COMMANDS
from dig_jax.components import Components
from dig_jax.errors import ConfigError, UserError
from dig_jax.evaluation.features import encode
from dig_jax.evaluation.features.dinov2 import Architecture, Dinov2

SMALL = Architecture(width=8, depth=1, heads=2, size=28, table=2)


@pytest.fixture(scope="module")
def network():
    graphdef, state = nnx.split(Dinov2("small", SMALL))
    random = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: np.float32(random.standard_normal(x.shape)), state))


def fields(folder):
    return {
        "auxiliary__repa_features": str(folder),
        "auxiliary__repa_weight": 0.5,
        "encode__features": "dinov2_vitb14",
        "encode__batch_size": 3,
    }


def test_the_features_are_those_of_the_latents_images_and_of_their_mirror_images(
    made, complete, network, tmp_path, monkeypatch
):
    monkeypatch.setattr(encode, "load_dinov2", lambda name, source: network)
    config = settings(made, complete[0], **fields(tmp_path / "features"))
    encode.encode_features(config)
    stored = Components(config).stored_features
    assert stored is not None
    images = np.stack([picture["image"] for picture in pictures(made, "train")])
    for array, these in ((stored.plain, images), (stored.flipped, images[:, :, ::-1])):
        expected = network.patch_features(jnp.asarray(these))
        assert array is not None and array.shape == expected.shape == (len(images), 2, 2, 8)
        np.testing.assert_allclose(array, expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(UserError, match="exists; expected a new folder"):
        encode.encode_features(config)


def test_patch_features_are_in_raster_order(network):
    """Without blocks, a token depends on its own patch only."""
    graphdef, state = nnx.split(network)
    state["blocks"] = jax.tree.map(np.zeros_like, state["blocks"])
    alone = nnx.merge(graphdef, state)
    images = np.random.default_rng(1).integers(0, 256, (2, 28, 28, 3), np.uint8)
    images[1, :14] = images[0, :14]
    images[1, 14:, :14] = images[0, 14:, :14]
    same = np.isclose(*alone.patch_features(jnp.asarray(images)), atol=1e-5).all(-1)
    np.testing.assert_array_equal(same, [[True, True], [True, False]])


def test_the_command_writes_features_if_the_config_names_a_network(made, complete, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(encode, "encode_features", called.append)
    config = settings(made, complete[0], **fields(tmp_path / "features"))
    COMMANDS["encode"].run(config, tmp_path, flags.FlagValues())
    assert called == [config]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auxiliary__repa_features": ""}, "missing config.auxiliary.repa_features"),
        ({"encode__features_weights": "/nowhere"}, "features_weights: .*no such file: /nowhere"),
        ({"encode__features_weights": ""}, "features_weights: .*no weights; download http"),
    ],
)
def test_bad_settings_end_with_one_line(made, complete, tmp_path, changes, message):
    config = settings(made, complete[0], **fields(tmp_path / "features") | changes)
    with pytest.raises(ConfigError, match=message):
        encode.encode_features(config)
    assert not list(tmp_path.iterdir())
