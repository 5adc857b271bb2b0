"""CelebA in pixels, as the released code trains it: faces cut to 64 × 64, without classes.

Needs `pip install -e '.[tfds]'` and the dataset as array_record (docs/data.md). celeba64.py:paper is the
released recipe to the letter (recipes.py), of 889,000 steps; no figures of it are published.

Cost, computed (benchmarks/costs.py) and not run: 1.4e19 flops, 48 hours of one v5e chip at 40 % of its
bfloat16 peak; the released recipe 3.0e19, 107 hours.
"""

from configs import base, recipes


def get_config(recipe: str = "ours"):
    c = base.get_config()
    c.data.name = "tfds"
    c.data.options.dataset = "celeb_a"
    c.data.options.data_dir = ""  # where it was prepared; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets
    c.data.options.image_size = 64
    c.data.options.num_classes = 0
    c.data.options.crop = "celeba"
    c.training.label_dropout = 0.0
    c.sampling.clip = recipe != "paper"  # upstream leaves pixels beyond [-1, 1] until the end
    if recipe == "paper":
        c.training.steps = 889_000  # 1,400 epochs of 635 whole batches
    recipes.follow(c, recipe)
    c.sampling.guidance_scale = 1.0  # there are no classes to guide to
    return c
