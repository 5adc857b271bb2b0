"""DiG-XL/2 on ImageNet's latents: dig_xl.py[:256|512|1024[,paper]]

The first argument is the resolution in pixels, the second the recipe (recipes.py); data as in imagenet.py.

Cost, computed (benchmarks/costs.py) and not run: 400,000 steps are 7.1e19 flops, 249 hours of one v5e chip
at 40 % of its bfloat16 peak; at 512 pixels, 1,024 tokens, 2.8e20 and 996; at 1024 pixels, 4,096 tokens,
1.1e21 and 3,982. The published FID of 2.07 with guidance is of 1,200,000 steps, three times that.
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "ours"):
    return imagenet.get_config("DiG-XL/2", resolution, recipe)
