"""Your own small images on a CPU, one folder per class: --config=configs/imagefolder_small.py:/path/to/images

The argument is the folder that holds the class folders. Images are 16 × 16, with one token per 2 × 2 pixels.
docs/guide/tutorial.md shows what it draws and how long it takes.
"""

from configs import base, recipes


def get_config(path: str = ""):
    c = recipes.modernize(base.get_config())
    c.model.depth = 4
    c.model.hidden_size = 128
    c.model.num_heads = 2
    c.model.internal_head = 1
    c.data.name = "image_folder"
    c.data.options.path = path
    c.data.options.image_size = 16
    c.data.batch_size = 32
    c.training.steps = 1500
    c.training.ema_decays = (0.99,)
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.schedule = "cosine"
    c.checkpoint.every_steps = 250
    c.checkpoint.keep_every_steps = 0
    c.logging.every_steps = 50
    c.logging.heldout_every_steps = 250
    c.sampling.every_steps = 500
    c.sampling.guidance_scale = 1.5
    c.sampling.clip = True
    c.mesh.cpu_devices = 2
    return c
