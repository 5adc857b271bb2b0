"""A folder of images, and a complete cache of its latents."""

import functools
import shutil

import pytest
from encoded_images import CLASSES, settings
from PIL import Image
from test_data_images import noise
from tiny_autoencoder import write_autoencoder

from dig_jax import autoencoder
from dig_jax.encoding.encode import encode


@pytest.fixture(scope="module", autouse=True)
def cached_autoencoders():
    """Loading takes longer than everything else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "load", functools.cache(autoencoder.load))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with images, two of which are corrupt, and an autoencoder that halves their sides."""
    root = tmp_path_factory.mktemp("made")
    for label, name in enumerate(CLASSES):
        folder = root / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(noise(16 + number, 20, seed=10 * label + number)).save(folder / f"{number}.png")
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:99])
    write_autoencoder(root / "autoencoder")
    return root


@pytest.fixture(scope="module")
def complete(made, tmp_path_factory):
    """A complete cache, and its index."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    return path, encode(settings(made, path))


@pytest.fixture
def copy(complete, tmp_path):
    return shutil.copytree(complete[0], tmp_path / "copy")
