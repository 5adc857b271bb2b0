"""The two recipes of the published experiments: theirs to the letter, and ours.

Both optimise the same thing in the same way, as base.py says: AdamW 1e-4 constant, no weight decay, no
clipping, batch 256, EMA 0.9999, linear betas, 1,000 steps, 10 % of the labels dropped, mirrored images.
"""

from ml_collections import ConfigDict

RECIPES = ("ours", "paper")


def follow(c: ConfigDict, recipe: str) -> ConfigDict:
    """Sets what the recipes differ in; `c` is changed, and given back.

    "paper" is the released training script and its sampler, as the published tables have them; "ours":
      model.dtype bfloat16      half the memory traffic of activations, and products faster than in TF32
                                (parameters, norms, loss, the scan's states, moments and averages are float32
                                in both)
      model.remat full          the same function; it leaves room for larger batches, and where memory traffic
                                is the limit it is the fastest (docs/plan.md)
      guidance of all channels  the first three of four are an oversight in DiT that DiG took over; on latents
                                a scale of 1.375 does what 1.5 does with three (FID 2.23 and 2.27 of DiT-XL/2,
                                says its author in pull request 12 of DiT's repository). "paper" draws without
                                guidance, as the published tables at 400,000 steps.
      long skips                joined in raster order (only for those who turn them on with model.skip)

    Raises:
        ValueError: an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"the recipe {recipe!r} is none of {', '.join(RECIPES)}")
    c.sampling.sampler = "ddpm"
    c.sampling.steps = 250
    if recipe == "paper":
        c.model.skip_alignment = "upstream"
        c.sampling.guidance_scale = 1.0
        c.sampling.guidance_channels = 3
    else:
        c.model.dtype = "bfloat16"
        c.model.remat = "full"
    return c
