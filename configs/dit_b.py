"""DiT-B/2, the baseline of DiG's paper, on ImageNet latents: dit_b.py[:256|512|1024[,meanflow|ours|paper]]

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data.

Cost of 400,000 steps on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py):

     256 px    1.4e19 FLOPs, 50 hours
     512 px    6.5e19 FLOPs, 230 hours
    1024 px    4.0e20 FLOPs, 1,424 hours
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiT-B/2", resolution, recipe)
