"""CelebA in pixels, as in the released code: faces cropped to 64 × 64, without classes.

The argument is the recipe (recipes.py): ours by default, modern, meanflow or paper.

Needs `pip install -e '.[tfds]'` and the dataset as array_record (docs/guide/data.md). celeba64.py:paper is
the released recipe exactly (recipes.py), with 889,000 steps; its authors published no scores.

Cost on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py): 1.4e19 FLOPs, 48
hours; with the released recipe 3.0e19 FLOPs, 107 hours.
"""

from configs import base, recipes


def get_config(recipe: str = "ours"):
    c = base.get_config()
    c.data.name = "tfds"
    c.data.options.dataset = "celeb_a"
    c.data.options.data_dir = ""  # directory of TFDS; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    c.data.options.image_size = 64
    c.data.options.num_classes = 0
    c.data.options.crop = "celeba"
    c.training.label_dropout = 0.0
    c.sampling.clip = recipe != "paper"  # the released code clips only the result
    if recipe == "paper":
        c.training.steps = 889_000  # 1,400 epochs of 635 full batches
    recipes.follow(c, recipe)
    c.sampling.guidance_scale = 1.0  # there are no classes to guide toward
    return c
