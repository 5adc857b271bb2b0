"""Your own images as latents: --config=configs/imagefolder_latents.py:/path/to/images

    python main.py --config=configs/imagefolder_latents.py:/path/to/images --mode=encode
    python main.py --config=configs/imagefolder_latents.py:/path/to/images

The argument is the folder that holds one folder per class. The first command writes latents/NAME_256, the
second trains on them. Images are 256 × 256 pixels, with one token per 2 × 2 latents (docs/guide/latents.md).

Cost on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py): 3.4e18 FLOPs, 12
hours.
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
    c.encode.options.heldout_path = (
        ""  # folder of held-out images of the same classes; "": a fraction of path
    )
    c.encode.options.heldout_fraction = 0.02  # fraction of the images to hold out, if heldout_path is empty
    c.encode.options.upright = True  # apply the EXIF orientation
    c.training.steps = 100_000
    c.training.ema_decays = (0.999,)
    return recipes.follow(c, "ours")
