"""DiG-L/2 on ImageNet latents: dig_l.py[:256|512|1024[,meanflow|ours|paper]] or dig_l.py:256,fast

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data.
"fast" is for 256 chips of TPU v5e (docs/guide/pods.md).

Cost of 400,000 steps on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py):

     256 px    4.9e19 FLOPs, 172 hours
     512 px    2.0e20 FLOPs, 689 hours
    1024 px    7.8e20 FLOPs, 2,755 hours
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiG-L/2", resolution, recipe)
