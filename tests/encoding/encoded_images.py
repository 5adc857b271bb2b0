"""Images, an autoencoder and the caches of their latents."""

import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from configs import base
from dig_jax import autoencoder, config
from dig_jax.data import load_source

CLASSES = ("ant", "bee")


def fields(made, path, **changes):
    """`encode__dtype="float16"` sets config.encode.dtype."""
    c = base.get_config()
    c.data.name, c.data.options = "latents", {"path": str(path)}
    c.autoencoder.path = str(made / "autoencoder")
    c.encode.name, c.encode.batch_size, c.encode.shard_size = "image_folder", 1, 5
    c.encode.options = {"path": str(made / "pictures"), "image_size": 16, "heldout_fraction": 0.25}
    for name, value in changes.items():
        group, field = name.split("__")
        c[group][field] = value
    return c.to_dict()


def settings(made, path, **changes):
    return config.from_dict(fields(made, path, **changes))


def tree(directory):
    """Return the content of all files by path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def pictures(made, split):
    source = load_source("image_folder", split, **settings(made, "").encode.options)
    encoded = [source.images.read(index) for index in range(len(source))]
    return [source.decode(image) for image in encoded if not image.name.endswith("3.png")]


def assert_holds(directory, made, atol):
    """Check that both splits hold the moments of all readable images and of their mirror images."""
    model = autoencoder.load(made / "autoencoder")
    for split in ("train", "heldout"):
        source, expected = load_source("latents", split, path=str(directory)), pictures(made, split)
        assert len(source) == len(expected) > 0
        for index, picture in enumerate(expected):
            for mirrored, image in enumerate((picture["image"], picture["image"][:, ::-1])):
                label, *moments = source.posterior(index, bool(mirrored))
                assert label == picture["label"]
                (computed,) = model.encode(image[None])
                np.testing.assert_allclose(np.concatenate(moments, axis=-1), computed, atol=atol)


def changed_autoencoder(made, tmp_path, factor):
    folder = shutil.copytree(made / "autoencoder", tmp_path / "autoencoder")
    file = folder / "diffusion_pytorch_model.safetensors"
    arrays = load_file(file)
    save_file(arrays | {"quant_conv.weight": arrays["quant_conv.weight"] * np.float32(factor)}, file)
    return folder


CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({!r})
"""
