"""U-DiG-XL on ImageNet latents: udig_xl.py[:256|512|1024[,meanflow|ours|paper]]

The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the data. The
paper draws U-DiG without sizes; the sizes are ours (models/u_dig.py).
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("U-DiG-XL", resolution, recipe)
