"""What the ImageNet experiments share: class-conditional latents of Stable Diffusion's autoencoder (8×).

The recipe is the published one and stands in base.py: AdamW 1e-4 constant, batch 256, 400,000 steps, EMA
0.9999. `--config.data.name=fake` runs the same shapes on synthetic data, to try out speed and memory.
"""

from configs import base

RESOLUTIONS = ("256", "512", "1024")


def get_config(model: str, resolution: str):
    if resolution not in RESOLUTIONS:
        raise ValueError(f"the resolution {resolution!r} is none of {', '.join(RESOLUTIONS)}")
    c = base.get_config()
    c.model.name = model
    c.data.name = "imagenet_latents"
    c.data.options.image_size = int(resolution) // 8
    c.data.options.channels = 4
    c.data.options.num_classes = 1000
    c.sampling.sampler = "ddpm"
    c.sampling.steps = 250
    return c
