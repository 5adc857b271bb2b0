"""LightningDiT (Yao et al. 2025) on ImageNet latents: lightningdit.py[:MODEL[,256|512|1024[,RECIPE]]]

MODEL is B/2, L/2, XL/2, B/1 or XL/1. The network is DiT with RMSNorm, SwiGLU and rotary positions. The
paper's models have patches of 1 on latents of VA-VAE with 1/16 of the rows and columns and 32 channels. Here
they get the latents that imagenet.py describes, on which patches of 2 give as many tokens. RECIPE is
modern, meanflow, ours or paper (recipes.py), as in the other ImageNet configs; none is LightningDiT's.
"""

from configs import imagenet


def get_config(model: str = "XL/2", resolution: str = "256", recipe: str = "modern"):
    c = imagenet.get_config(f"DiT-{model}", resolution, recipe)
    c.model.norm, c.model.mlp, c.model.rope = "rms", "swiglu", True
    return c
