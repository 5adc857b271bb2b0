"""What the ImageNet experiments share: class-conditional latents of Stable Diffusion's autoencoder (8×).

    python main.py --config=configs/dig_xl.py --mode=encode --config.encode.options.path=/data/imagenet/train
    python main.py --config=configs/dig_xl.py

The first command reads a directory per class and writes latents/imagenet_256, which all models and both
recipes share; with `--config.encode.options.heldout_path=/data/imagenet/val`, of the same layout, there is a
held-out loss too. docs/configs.md says how to read ImageNet from TFDS instead.
"""

from ml_collections import ConfigDict

from configs import base, recipes

RESOLUTIONS = ("256", "512", "1024")


def get_config(model: str, resolution: str, recipe: str) -> ConfigDict:
    if resolution not in RESOLUTIONS:
        raise ValueError(f"the resolution {resolution!r} is none of {', '.join(RESOLUTIONS)}")
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
    c.encode.options.upright = False  # as upstream, which ignores EXIF orientation
    c.encode.options.heldout_path = ""
    c.encode.options.heldout_fraction = 0.0  # of the training images, where there is no heldout_path
    c.encode.batch_size = max(32 * 256**2 // pixels**2, 1)
    c.sampling.guidance_scale = 1.375
    return recipes.follow(c, recipe)
