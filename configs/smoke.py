"""A test of everything in less than a minute on a CPU: train on synthetic images, save, sample, draw."""

from configs import base


def get_config():
    c = base.get_config()
    c.model.depth = 5  # one group of four blocks, and one more
    c.model.hidden_size = 64
    c.model.num_heads = 1
    c.data.name = "fake"
    c.data.batch_size = 16
    c.data.options.image_size = 8
    c.data.options.num_classes = 4
    c.training.steps = 20
    c.training.ema_decays = (0.9, 0.99)
    c.optimizer.learning_rate = 1e-3
    c.checkpoint.every_steps = 10
    c.checkpoint.keep_every_steps = 0
    c.logging.every_steps = 5
    c.logging.heldout_every_steps = 10
    c.sampling.every_steps = 10
    c.sampling.images_per_class = 2
    c.sampling.steps = 5
    return c
