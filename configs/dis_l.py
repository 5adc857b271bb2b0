"""DiS-L/2 (Mamba) on ImageNet latents: dis_l.py[:256|512|1024[,ours|paper]]

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data.
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiS-L/2", resolution, recipe)
