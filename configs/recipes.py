"""The recipes: "modern", the default for ImageNet; "meanflow" for images in one step; "ours"; "paper",
exactly as released; "fast" for a pod.

"paper" and "ours" optimize the same objective in the same way, with the defaults of dig_jax.config: AdamW,
1e-4 constant, no weight decay, no clipping, batch 256, EMA 0.9999, linear betas, 1,000 noise levels, 10 %
label dropout, horizontal flips. "modern" is "ours" with another objective and sampler, and "meanflow" is
"modern" with yet another. "fast" is "ours" with a larger batch (`scale_batch`).
"""

from ml_collections import ConfigDict

from dig_jax.errors import alternatives
from dig_jax.models.registry import find_model

RECIPES = ("modern", "meanflow", "ours", "paper")
_WARMUP_STEPS = 1000


def follow(c: ConfigDict, recipe: str) -> ConfigDict:
    """Set the fields in which the recipes differ, in place, and return the config.

    "paper" is the released training script and the sampler of the published tables. "ours" changes:
      model.dtype bfloat16      half the memory traffic of activations, and faster products than in TF32;
                                parameters, norms, losses, states, moments and averages are float32 in all
      model.remat full          the same function; less memory, and faster where memory traffic is the limit
                                (docs/guide/plan.md)
      guidance on all channels  guiding only three of four channels is an oversight in DiT that DiG inherited.
                                On latents a scale of 1.375 on all channels matches 1.5 on three: FID 2.23 and
                                2.27 for DiT-XL/2, according to its author in pull request 12 of DiT's
                                repository. "paper" samples without guidance, like the published tables at
                                400,000 steps.
      long skips                joined in raster order; this matters only if model.skip enables them

    Raises:
        ValueError: unknown recipe, or "meanflow" for DiS, whose scan has no derivative in forward mode.
    """
    model = c.model.name
    known = [name for name in RECIPES if name != "meanflow" or find_model(model)[0].name != "DiS"]
    if recipe not in known:
        raise ValueError(f"invalid recipe {recipe!r} for {model}; expected {alternatives(known)}")
    c.sampling.sampler = "ddpm"
    c.sampling.steps = 250
    if recipe == "paper":
        c.model.skip_alignment = "upstream"
        c.sampling.guidance_scale = 1.0
        c.sampling.guidance_channels = 3
        return c
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    if recipe == "ours":
        return c
    return modernize(c) if recipe == "modern" else use_mean_flow(c)


def modernize(c: ConfigDict) -> ConfigDict:
    """Set the objective, averages and sampler that win on the digits (benchmarks/README.md), in place."""
    c.diffusion.process = "flow"  # the linear path and its velocity, as in SiT (Ma et al. 2024)
    c.diffusion.times = "logit_normal"  # mean 0 and deviation 1, as in Stable Diffusion 3 (Esser et al. 2024)
    c.model.learn_sigma = False  # flow matching has no variance to learn
    family, size, _ = find_model(c.model.name)
    # A quarter of the depth. Internal Guidance (CVPR 2026) puts the head after 8 of 28 blocks.
    c.model.internal_head = family.sizes[size].depth // 4
    c.optimizer.clip_norm = 1.0  # as in REPA (Yu et al. 2025)
    c.training.ema_decays = (0.9999, 0.9996)  # as in JiT (Li & He 2025)
    c.sampling.sampler = "dpmpp_2m"  # Lu et al. 2022
    c.sampling.steps = 20
    c.sampling.internal_guidance_scale = 1.4  # as in Internal Guidance, beside a scale of 1.35 to 1.45
    return c


def use_mean_flow(c: ConfigDict) -> ConfigDict:
    """Set the objective and the sampler of images in one step, in place (Geng et al. 2025, iMF)."""
    modernize(c)
    c.diffusion.process = "meanflow"
    c.diffusion.time_mean = -0.4
    c.model.flow_map = True
    c.model.internal_head = 0  # guidance is an input of the network
    c.optimizer.b2 = 0.95
    c.sampling.sampler = "meanflow"
    c.sampling.steps = 1
    c.sampling.clip = False  # its steps pass no predicted images
    c.sampling.internal_guidance_scale = 1.0
    return c


def scale_batch(c: ConfigDict, factor: int) -> ConfigDict:
    """Multiply the batch size, in place, and change what depends on it: the run sees as many images.

    The learning rate grows with the square root of the factor, the rule for Adam (Malladi et al. 2022,
    arXiv:2205.10287), after a warm-up. The averages forget an image after as many others as before. This
    has not been run.
    """
    c.data.batch_size *= factor
    c.training.steps = -(-c.training.steps // factor)
    c.training.ema_decays = tuple(round(decay**factor, 6) for decay in c.training.ema_decays)
    c.optimizer.learning_rate = float(f"{c.optimizer.learning_rate * factor**0.5:.3g}")
    c.optimizer.warmup_steps = _WARMUP_STEPS
    return c
