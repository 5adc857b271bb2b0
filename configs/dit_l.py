"""DiT-L/2, the baseline of DiG's paper, on ImageNet's latents: dit_l.py[:256|512|1024[,paper]]

The first argument is the resolution in pixels, the second the recipe (recipes.py); data as in imagenet.py.

Cost, computed (benchmarks/costs.py) and not run: 400,000 steps are 5.0e19 flops, 175 hours of one v5e chip
at 40 % of its bfloat16 peak; at 512 pixels, 1,024 tokens, 2.2e20 and 782; at 1024 pixels, 4,096 tokens,
1.3e21 and 4,466.
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "ours"):
    return imagenet.get_config("DiT-L/2", resolution, recipe)
