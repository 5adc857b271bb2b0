"""DiG-L/2 on ImageNet's latents: dig_l.py[:256|512|1024[,paper]]

The first argument is the resolution in pixels, the second the recipe (recipes.py); data as in imagenet.py.

Cost, computed (benchmarks/costs.py) and not run: 400,000 steps are 4.9e19 flops, 172 hours of one v5e chip
at 40 % of its bfloat16 peak; at 512 pixels, 1,024 tokens, 2.0e20 and 689; at 1024 pixels, 4,096 tokens,
7.8e20 and 2,755.
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "ours"):
    return imagenet.get_config("DiG-L/2", resolution, recipe)
