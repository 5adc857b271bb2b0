"""The fields of the diffusion process and of the losses."""

import dataclasses

from dig_jax.config.field import Group, field


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Group, path="config.diffusion"):
    """The diffusion process and the loss."""

    process: str = field(
        "ddpm",
        "ddpm (Ho et al. 2020), flow (flow matching, Lipman et al. 2023) or meanflow (flow matching for one"
        " step, Geng et al. 2025), which needs model.flow_map; docs/concepts/diffusion.md.",
        choices=("ddpm", "flow", "meanflow"),
    )
    schedule: str = field(
        "linear", "Noise schedule of ddpm: linear (Ho et al. 2020) or cosine (Nichol & Dhariwal 2021)."
    )
    num_steps: int = field(1000, "Number of noise levels of ddpm.")
    loss: str = field("mse", "Loss of ddpm: mse, rescaled_mse, kl or rescaled_kl (Nichol & Dhariwal 2021).")
    path: str = field(
        "linear", "Path of flow from data to noise: linear, trigonometric or vp (Ma et al. 2024)."
    )
    prediction: str = field(
        "velocity", "What the network predicts in flow: velocity, x, noise or v (Salimans & Ho 2022)."
    )
    weight: str = field(
        "none",
        "Weight of the squared error by time: none, min_snr (Hang et al. 2023) or, for flow, velocity: the"
        " error of the velocity, whatever is predicted, as in JiT.",
    )
    times: str = field(
        "uniform", "Training times of flow: uniform or logit_normal (Esser et al. 2024); 1 is noise."
    )
    time_mean: float = field(0.0, "Mean of the logit of the times (logit_normal only).")
    time_std: float = field(1.0, "Deviation of the logit of the times (logit_normal only).")
    time_low: float = field(0.0, "Least training time, before the shift.", bounds="fraction")
    time_high: float = field(1.0, "Greatest training time, before the shift.", bounds="fraction")
    time_shift: float | None = field(
        1.0,
        "Shift of the times of training and sampling toward noise, as a factor of t/(1 - t); 1: none; 0:"
        " √(height·width·channels/4096) (Zheng et al. 2025).",
        none=0.0,
        bounds="positive",
    )
    noise_scale: float | None = field(
        1.0,
        "Factor of the noise of flow, in training and sampling; 0: √(height·width)/256 of the model's images"
        " (Li & He 2025, JiT).",
        none=0.0,
        bounds="positive",
    )
    instant_fraction: float = field(
        0.5, "Fraction of the steps of meanflow that have length 0, as in flow.", bounds="fraction"
    )
    guidance_max: float = field(
        8.0, "Greatest scale of guidance that meanflow trains; 1: train without guidance.", bounds="positive"
    )
    guidance_power: float = field(
        1.0, "p in the density w^-p of the scale of guidance in meanflow.", bounds="nonnegative"
    )
    time_range: float = field(
        10.0,
        "Greatest timestep that the network of meanflow gets; 1000 to start from a model of flow.",
        bounds="positive",
    )


@dataclasses.dataclass(frozen=True)
class AuxiliaryConfig(Group, path="config.auxiliary"):
    """Losses that add to the denoising loss (docs/concepts/diffusion.md); 0: none. Blocks count from 0."""

    internal_weight: float = field(
        0.5, "Weight of the internal head's loss, with model.internal_head.", bounds="positive"
    )
    log_variance: bool = field(
        False, "Weight the loss by a learned variance of the noise level (Karras et al. 2024, EDM2)."
    )
    dispersive_weight: float = field(
        0.0, "Weight of the dispersive loss; 0.5 in Wang & He 2025.", bounds="nonnegative"
    )
    dispersive_block: int = field(
        0, "Block of the dispersive loss; a quarter of the depth in Wang & He 2025.", bounds="nonnegative"
    )
    dispersive_temperature: float = field(0.5, "Temperature of the dispersive loss.", bounds="positive")
    dispersive_group: int = field(
        16, "Images that the dispersive loss compares with each other, on any devices.", bounds="positive"
    )
    contrastive_weight: float = field(
        0.0,
        "Weight of contrastive flow matching; 0.05 in Stoica et al. 2025 (flow only).",
        bounds="below_one",
    )
    sra_weight: float = field(
        0.0,
        "Weight of self-representation alignment with an average of the model (SRA).",
        bounds="nonnegative",
    )
    sra_block: int = field(0, "Block of the student.", bounds="nonnegative")
    sra_teacher_block: int = field(0, "Block of the teacher, a later one.", bounds="nonnegative")
    repa_weight: float = field(
        0.0,
        "Weight of representation alignment with an encoder's features (iREPA); 0.5 to 1.",
        bounds="nonnegative",
    )
    repa_features: str | None = field(
        None,
        "Folder with features of the training images, which `--mode=encode` writes with `encode.features`;"
        " empty: none.",
        none="",
    )
    repa_block: int = field(0, "Block of representation alignment.", bounds="nonnegative")
    distill_weight: float = field(
        0.0,
        "Weight of the distance to a trained model's prediction and variance (Wang et al. 2025, LiT).",
        bounds="nonnegative",
    )
    distill_from: str | None = field(
        None,
        "Workdir, checkpoint or exported file of the model to distill, or hf://OWNER/NAME; empty: none.",
        none="",
    )
    until: int | None = field(
        None,
        "Number of steps after which the dispersive, contrastive, SRA, iREPA and distillation losses end; 0:"
        " never.",
        none=0,
        bounds="positive",
    )
