"""CIFAR-10 in pixels, as in the released code: 32 × 32, ten classes, one token per 2 × 2 pixels.

The argument is the recipe (recipes.py): ours by default, modern, meanflow or paper.

Needs `pip install -e '.[tfds]'` and the dataset as array_record (docs/guide/data.md). cifar10.py:paper is the
released recipe exactly (recipes.py); its authors published no scores.

Cost on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py): 2.3e18 FLOPs, 8
hours.
"""

from configs import base, recipes


def get_config(recipe: str = "ours"):
    c = base.get_config()
    c.data.name = "tfds"
    c.data.options.dataset = "cifar10"
    c.data.options.data_dir = ""  # directory of TFDS; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    c.data.options.image_size = 32
    c.data.options.num_classes = 10
    c.training.steps = 273_000  # 1,400 epochs of 195 full batches
    c.sampling.clip = recipe != "paper"  # the released code clips only the result
    return recipes.follow(c, recipe)
