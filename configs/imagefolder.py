"""Somebody's own pictures, in a directory per class: --config=configs/imagefolder.py:/path/to/pictures

The argument is the directory. In pixels, 64 × 64, a token per 4 × 4 of them (docs/data.md).

Cost, computed and not run: 8.5e17 flops, 3 hours of one v5e chip at 40 % of its bfloat16 peak.
"""

from configs import base


def get_config(path: str = ""):
    c = base.get_config()
    c.model.name = "DiG-S/4"
    c.data.name = "image_folder"
    c.data.options.path = path
    c.data.options.image_size = 64
    c.data.options.crop = "adm"  # the centre: adm | celeba (aligned CelebA only)
    c.data.options.heldout_path = ""  # held-out images of the same classes; "": a part of path
    c.data.options.heldout_fraction = 0.02  # that part
    c.data.options.upright = True  # turn pictures as their EXIF orientation says
    c.training.steps = 100_000
    c.training.ema_decays = (0.999,)
    c.sampling.clip = True
    return c
