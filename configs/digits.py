"""Scikit-learn's handwritten digits: a class-conditional DiG that trains in minutes on a CPU."""

from configs import base


def get_config():
    c = base.get_config()
    c.model.depth = 4
    c.model.hidden_size = 96
    c.model.num_heads = 2
    c.data.name = "digits"
    c.data.batch_size = 64
    c.diffusion.schedule = "cosine"  # with linear betas, noise hides such small images at most steps
    c.training.steps = 2400
    c.training.ema_decays = (0.99,)
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.schedule = "cosine"
    c.optimizer.clip_norm = 1.0
    c.checkpoint.every_steps = 500
    c.checkpoint.keep_every_steps = 0
    c.logging.every_steps = 50
    c.logging.heldout_every_steps = 250
    c.sampling.every_steps = 1000
    c.sampling.guidance_scale = 1.1
    c.sampling.clip = True
    c.mesh.cpu_devices = 2
    return c
