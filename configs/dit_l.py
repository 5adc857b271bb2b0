"""DiT-L/2, the baseline of DiG's paper, on ImageNet latents: dit_l.py[:256|512|1024[,meanflow|ours|paper]]

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data.

Cost of 400,000 steps on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py):

     256 px    5.0e19 FLOPs, 175 hours
     512 px    2.2e20 FLOPs, 782 hours
    1024 px    1.3e21 FLOPs, 4,466 hours
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiT-L/2", resolution, recipe)
