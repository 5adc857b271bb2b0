"""DiT-XL/2, the baseline of DiG's paper, on ImageNet latents: dit_xl.py[:256|512|1024[,meanflow|ours|paper]]

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data.

Cost of 400,000 steps on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py):

     256 px    7.3e19 FLOPs, 257 hours
     512 px    3.2e20 FLOPs, 1,136 hours
    1024 px    1.8e21 FLOPs, 6,301 hours
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiT-XL/2", resolution, recipe)
