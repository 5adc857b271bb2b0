"""The fields of `sampling`, as in `fields.py`."""

import dataclasses
from typing import Any

from dig_jax.config.field import Group, field


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Group, path="config.sampling"):
    """Options for drawing images, during training and with `--mode=sample`."""

    every_steps: int | None = field(
        10_000, "Steps between sample grids in training; 0: only at the end.", none=0, bounds="positive"
    )
    images_per_class: int = field(10, "Images per class in a sample grid.", bounds="positive")
    sampler: str = field("ddim", "Name of the sampler, such as ddim or heun (docs/concepts/diffusion.md).")
    sampler_options: dict[str, Any] = field(
        {}, "Options of the sampler, such as eta of ddim (docs/concepts/diffusion.md)."
    )
    steps: int = field(50, "Number of sampling steps.", bounds="positive")
    time_shift: float | None = field(
        1.0,
        "Further shift of the times of sampling in flow toward noise, as a factor of t/(1 - t); 1: none; 0:"
        " √(tokens / tokens of the training images) for images of another size (Esser et al. 2024, SD3).",
        none=0.0,
        bounds="positive",
    )
    guidance: str = field(
        "classifier_free",
        "Guidance rule: classifier_free, cfg_zero, apg, autoguidance or perturbed"
        " (docs/concepts/diffusion.md).",
    )
    guidance_options: dict[str, Any] = field(
        {}, "Options of the guidance rule, such as eta of apg (docs/concepts/diffusion.md)."
    )
    guidance_scale: float = field(
        1.5,
        "Scale of guidance; 1: none. Classifier-free guidance is uncond + scale·(cond - uncond).",
        bounds="nonnegative",
    )
    guidance_interval: tuple[float, ...] = field(
        (0.0, 1.0),
        "Least and greatest time with guidance, as fractions of the process; 1 is noise (Kynkäänniemi et al."
        " 2024).",
    )
    guidance_rescale: float = field(
        0.0,
        "How far the guided prediction gets the deviation of the unguided one, 0 … 1 (Lin et al. 2024).",
        bounds="fraction",
    )
    internal_guidance_scale: float = field(
        1.0,
        "Scale of internal guidance, internal + scale·(output - internal), for models with"
        " `model.internal_head`; 1: none.",
        bounds="nonnegative",
    )
    cache_interval: int = field(
        1,
        "Steps from one full evaluation of the network to the next; the others extrapolate its features"
        " (after Liu et al. 2025, TaylorSeer); 1: no caching.",
        bounds="positive",
    )
    cache_order: int = field(
        1, "Degree of the extrapolation of features; 0: reuse them.", bounds="nonnegative"
    )
    weak_model: str | None = field(
        None,
        "Workdir, checkpoint or exported file of the weaker model of guidance=autoguidance, or"
        " hf://OWNER/NAME; empty: none.",
        none="",
    )
    guidance_channels: int | None = field(
        None,
        "Number of leading channels to guide; 0: all. The released code guides 3 of 4.",
        none=0,
        bounds="positive",
    )
    clip: bool = field(False, "Clip the predicted image to [-1, 1] at every step (pixels only).")
    ema: str | None = field(
        None,
        "Name of the average to sample with, or params for the parameters themselves; empty: the first one.",
        none="",
    )
    uint8: str = field(
        "round",
        "How pixels become 8-bit integers: round (to nearest), or truncate as ADM does, which is half a gray"
        " level darker.",
        choices=("round", "truncate"),
    )
    batch_size: int = field(100, "Images per batch.", bounds="positive")
