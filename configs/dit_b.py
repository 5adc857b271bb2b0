"""DiT-B/2, the baseline of DiG's paper, on ImageNet's latents: dit_b.py[:256|512|1024[,paper]]

The first argument is the resolution in pixels, the second the recipe (recipes.py); data as in imagenet.py.

Cost, computed (benchmarks/costs.py) and not run: 400,000 steps are 1.4e19 flops, 50 hours of one v5e chip at
40 % of its bfloat16 peak; at 512 pixels, 1,024 tokens, 6.5e19 and 230; at 1024 pixels, 4,096 tokens, 4.0e20
and 1,424.
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "ours"):
    return imagenet.get_config("DiT-B/2", resolution, recipe)
