"""Samplers of latents with an autoencoder, and sets of their images."""

import functools
import re

import numpy as np
import pytest
from PIL import Image
from tiny_autoencoder import write_autoencoder

import dig_jax
from dig_jax import ConfigError
from dig_jax.autoencoder import to_uint8
from dig_jax.data import ImageSpec
from dig_jax.sampling.sample import sample
from dig_jax.testing import tiny_settings, write_checkpoint

CATS = ImageSpec((4, 6, 4), ("n02123045", "n02099601", "siamese"))


def latent_settings(folder, **changes):
    """Batches of 3 images: tests that draw 3 or more share one compiled program."""
    changes = {"data__name": "latents", "data__options": {}, "autoencoder__path": str(folder)} | changes
    return tiny_settings(sampling__steps=2, sampling__batch_size=3, **changes)


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    """A workdir whose latents do not exist, and the folder of its autoencoder."""
    folder = write_autoencoder(tmp_path_factory.mktemp("autoencoder"))
    workdir = tmp_path_factory.mktemp("run")
    write_checkpoint(workdir, latent_settings(folder), image_spec=CATS)
    return workdir, folder


@functools.cache
def loaded(workdir):
    return dig_jax.load(workdir)


def test_latents_are_decoded_by_the_autoencoder_that_the_config_names(latent_run):
    sampler = loaded(latent_run[0])
    latents = sampler([0, 1, 2], seeds=[3, 4, 5], return_latents=True)
    images = sampler([0, 1, 2], seeds=[3, 4, 5])
    assert latents.shape == (3, 4, 6, 4)
    factor = sampler.components.autoencoder.config.downsampling
    assert images.shape == (3, 4 * factor, 6 * factor, 3) == (3, *sampler.output_shape)
    expected = np.asarray(to_uint8(sampler.components.autoencoder.decode(latents)))
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert sampler.trajectory([0]).shape == (2, 1, *sampler.output_shape)


def test_decoding_in_batches_changes_nothing(latent_run, monkeypatch):
    sampler = loaded(latent_run[0])
    whole = sampler(seeds=range(5)).astype(int)
    monkeypatch.setattr("dig_jax.sampling.sampler._DECODED_LATENT_PIXELS", 1)
    assert np.abs(sampler(seeds=range(5)) - whole).max() <= 1


def test_classes_are_drawn_by_name_without_the_data(latent_run):
    sampler = loaded(latent_run[0])
    labels, _ = sampler.resolve(["golden retriever", "tabby", 2, "Siamese"], None)
    np.testing.assert_array_equal(labels, [1, 0, 2, 2])
    np.testing.assert_array_equal(sampler.resolve("golden_retriever", None)[0], [1])
    with pytest.raises(ValueError, match="unknown class 'golden retreiver'; did you mean 'golden retriever'"):
        sampler("golden retreiver")


def test_the_size_of_decoded_images_is_in_pixels(latent_run):
    sampler = loaded(latent_run[0])
    factor = sampler.components.autoencoder.config.downsampling
    assert sampler(size=(2 * factor, 4 * factor)).shape == (1, 2 * factor, 4 * factor, 3)
    patch = factor * sampler.components.abstract_model.patch_size
    assert patch > factor
    for size in (0, 3, factor, (patch, patch + factor)):
        message = re.escape(f"invalid size={size}; expected positive multiples of {patch} pixels")
        with pytest.raises(ValueError, match=message):
            sampler(size=size)


def test_another_autoencoder_can_be_given(latent_run, tmp_path):
    sampler = dig_jax.load(latent_run[0], autoencoder=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config.autoencoder.path: invalid autoencoder .*none'"):
        sampler()
    assert dig_jax.load(latent_run[0], autoencoder=latent_run[1])(seeds=range(3)).shape[-1] == 3


def test_a_set_of_decoded_images_is_written_with_titles(latent_run):
    workdir, folder = latent_run
    sample(latent_settings(folder), workdir, lambda names: [0, 2, 1])
    with np.load(workdir / "generated.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], loaded(workdir)([0, 2, 1]))
    with Image.open(workdir / "generated.png") as picture:
        assert picture.width > 3 * loaded(workdir).output_shape[1]
