"""DiG-XL/2 on ImageNet latents: dig_xl.py[:256|512|1024[,meanflow|ours|paper]] or dig_xl.py:256|512,fast

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data.
"fast" is for 256 chips of TPU v5e (docs/guide/pods.md).

Cost of 400,000 steps on one TPU v5e chip at 40 % of its bfloat16 peak, computed (benchmarks/costs.py):

     256 px    7.1e19 FLOPs, 249 hours
     512 px    2.8e20 FLOPs, 996 hours
    1024 px    1.1e21 FLOPs, 3,982 hours

The published FID of 2.07, with guidance, is for 1,200,000 steps.
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiG-XL/2", resolution, recipe)
