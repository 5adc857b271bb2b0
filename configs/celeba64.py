"""CelebA in pixels, as the released code trains it: faces cut to 64 × 64, without classes.

Needs `pip install -e '.[tfds]'` and the dataset as array_record (docs/data.md). The recipe is base.py's.

Cost, computed and not run: 1.4e19 flops, 48 hours of one v5e chip at 40 % of its bfloat16 peak.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.data.name = "tfds"
    c.data.options.dataset = "celeb_a"
    c.data.options.data_dir = ""  # where it was prepared; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets
    c.data.options.image_size = 64
    c.data.options.num_classes = 0
    c.data.options.crop = "celeba"
    c.training.label_dropout = 0.0
    c.sampling.guidance_scale = 1.0
    c.sampling.clip = True
    return c
