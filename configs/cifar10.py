"""CIFAR-10 in pixels, as the released code trains it: 32 × 32, ten classes, a token per 2 × 2 pixels.

Needs `pip install -e '.[tfds]'` and the dataset as array_record (docs/data.md). cifar10.py:paper is the
released recipe to the letter (recipes.py); no figures of it are published.

Cost, computed (benchmarks/costs.py) and not run: 2.3e18 flops, 8 hours of one v5e chip at 40 % of its
bfloat16 peak.
"""

from configs import base, recipes


def get_config(recipe: str = "ours"):
    c = base.get_config()
    c.data.name = "tfds"
    c.data.options.dataset = "cifar10"
    c.data.options.data_dir = ""  # where it was prepared; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets
    c.data.options.image_size = 32
    c.data.options.num_classes = 10
    c.training.steps = 273_000  # 1,400 epochs of 195 whole batches
    c.sampling.clip = recipe != "paper"  # upstream leaves pixels beyond [-1, 1] until the end
    return recipes.follow(c, recipe)
