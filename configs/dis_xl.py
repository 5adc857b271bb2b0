"""A DiS with the parameters of DiG-XL/2, on ImageNet latents: dis_xl.py[:256|512|1024[,ours|paper]]

DiG's paper compares with "DiS-XL/2", but DiS was released without a size XL. This one has 64 + 1 blocks of
width 1,152. The arguments are the resolution in pixels and the recipe (recipes.py). imagenet.py describes the
data.
"""

from configs import imagenet


def get_config(resolution: str = "256", recipe: str = "modern"):
    return imagenet.get_config("DiS-1152x64/2", resolution, recipe)
