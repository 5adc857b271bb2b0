"""Your own images in pixels, one folder per class: --config=configs/imagefolder.py:/path/to/images

The argument is the folder that holds the class folders. Images are 64 × 64, with one token per 4 × 4 pixels
(docs/guide/data.md).

Cost on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py): 8.5e17 FLOPs, 3
hours.
"""

from configs import base


def get_config(path: str = ""):
    c = base.get_config()
    c.model.name = "DiG-S/4"
    c.data.name = "image_folder"
    c.data.options.path = path
    c.data.options.image_size = 64
    c.data.options.crop = "adm"  # center crop: adm | celeba (aligned CelebA only)
    c.data.options.heldout_path = ""  # folder of held-out images of the same classes; "": a fraction of path
    c.data.options.heldout_fraction = 0.02  # fraction of the images to hold out, if heldout_path is empty
    c.data.options.upright = True  # apply the EXIF orientation
    c.training.steps = 100_000
    c.training.ema_decays = (0.999,)
    c.sampling.clip = True
    return c
