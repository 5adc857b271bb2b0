"""DiG-S/2 on ImageNet latents: dig_s.py[:256|512|1024[,meanflow|ours|paper]] or dig_s.py:256,fast

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data.
"fast" is for 256 chips of TPU v5e (docs/guide/pods.md).

Cost of 400,000 steps on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py):

     256 px    3.4e18 FLOPs, 12 hours
     512 px    1.4e19 FLOPs, 48 hours
    1024 px    5.5e19 FLOPs, 192 hours
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiG-S/2", resolution, recipe)
