"""Somebody's own pictures as latents: --config=configs/imagefolder_latents.py:/path/to/pictures

    python main.py --config=configs/imagefolder_latents.py:/path/to/pictures --mode=encode
    python main.py --config=configs/imagefolder_latents.py:/path/to/pictures

The argument is the directory, with one per class in it; the first command writes latents/NAME_256, the second
trains on them. 256 × 256 pixels, a token per 2 × 2 latents (docs/latents.md).

Cost, computed (benchmarks/costs.py) and not run: 3.4e18 flops, 12 hours of one v5e chip at 40 % of its
bfloat16 peak.
"""

from pathlib import Path

from configs import base, recipes


def get_config(path: str = ""):
    c = base.get_config()
    c.model.name = "DiG-B/2"
    c.data.name = "latents"
    c.data.options.path = f"latents/{Path(path).absolute().name}_256"
    c.autoencoder.path = "stabilityai/sd-vae-ft-ema"
    c.encode.name = "image_folder"
    c.encode.options.path = path
    c.encode.options.image_size = 256
    c.encode.options.crop = "adm"
    c.encode.options.heldout_path = ""  # held-out images of the same classes; "": a part of path
    c.encode.options.heldout_fraction = 0.02  # that part
    c.encode.options.upright = True  # turn pictures as their EXIF orientation says
    c.training.steps = 100_000
    c.training.ema_decays = (0.999,)
    return recipes.follow(c, "ours")
