"""Shared by the ImageNet configs: class-conditional models on latents of Stable Diffusion's autoencoder.

    python main.py --config=configs/dig_xl.py --mode=encode --config.encode.options.path=/data/imagenet/train
    python main.py --config=configs/dig_xl.py

The first command reads one folder per class and writes latents/imagenet_256, which all models and
recipes use. Add `--config.encode.options.heldout_path=/data/imagenet/val`, a folder of the same layout, to
measure a held-out loss. docs/reference/configs.md describes how to read ImageNet from TFDS instead.
"""

from ml_collections import ConfigDict

from configs import base, recipes
from dig_jax.errors import alternatives

RESOLUTIONS = ("256", "512", "1024")
_BLOCK_REMAT = 1024  # pixels
# The recipe "fast": multiple of the batch of 256, and config.mesh.fsdp, on 256 chips of TPU v5e
# (--topology=v5e:16x16). docs/guide/pods.md has the planned speed.
_FAST = {
    ("DiG-S/2", "256"): (16, 1),
    ("DiG-B/2", "256"): (16, 1),
    ("DiG-L/2", "256"): (12, 2),
    ("DiG-XL/2", "256"): (12, 2),
    ("DiG-XL/2", "512"): (4, 1),
}


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
    if recipe in ("modern", "meanflow"):
        c.sampling.guidance_interval = (0.0, 0.7)  # of classifier-free guidance, as in Internal Guidance
    if recipe != "fast":
        c = recipes.follow(c, recipe)
        if c.model.remat == "full" and pixels >= _BLOCK_REMAT:
            c.model.remat = "block"  # less memory and, from this size on, faster (docs/guide/plan.md)
        return c
    if (model, resolution) not in _FAST:
        known = [f"{name} at {size} px" for name, size in _FAST]
        raise ValueError(f"no recipe 'fast' for {model} at {resolution} px; expected {alternatives(known)}")
    factor, c.mesh.fsdp = _FAST[model, resolution]
    return recipes.scale_batch(recipes.follow(c, "ours"), factor)
