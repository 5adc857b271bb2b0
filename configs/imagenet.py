"""Shared by the ImageNet configs: class-conditional models on latents of Stable Diffusion's autoencoder.

    python main.py --config=configs/dig_xl.py --mode=encode --config.encode.options.path=/data/imagenet/train
    python main.py --config=configs/dig_xl.py

The first command reads one folder per class and writes latents/imagenet_256, which all models and both
recipes use. Add `--config.encode.options.heldout_path=/data/imagenet/val`, a folder of the same layout, to
measure a held-out loss. docs/configs.md describes how to read ImageNet from TFDS instead.
"""

from ml_collections import ConfigDict

from configs import base, recipes
from dig_jax.errors import alternatives

RESOLUTIONS = ("256", "512", "1024")


def get_config(model: str, resolution: str, recipe: str) -> ConfigDict:
    if resolution not in RESOLUTIONS:
        raise ValueError(f"invalid resolution {resolution!r}; expected {alternatives(RESOLUTIONS)}")
    pixels = int(resolution)
    c = base.get_config()
    c.model.name = model
    c.data.name = "latents"
    c.data.options.path = f"latents/imagenet_{pixels}"
    c.data.options.image_size = pixels // 8
    c.data.options.channels = 4
    c.data.options.num_classes = 1000
    c.autoencoder.path = "stabilityai/sd-vae-ft-ema"
    c.encode.name = "image_folder"
    c.encode.options.path = ""
    c.encode.options.image_size = pixels
    c.encode.options.crop = "adm"
    c.encode.options.upright = False  # the released code ignores the EXIF orientation
    c.encode.options.heldout_path = ""
    c.encode.options.heldout_fraction = 0.0  # fraction of the training images, if heldout_path is empty
    c.encode.batch_size = max(32 * 256**2 // pixels**2, 1)
    c.sampling.guidance_scale = 1.375
    return recipes.follow(c, recipe)
