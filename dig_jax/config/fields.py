"""The fields of the configuration: type, default, description, unit and source.

Defaults are DiG's published recipe (Zhu et al. 2025, section 4.1, and the released training script) where
there is one. configs/base.py and docs/reference/config_reference.md are generated from these dataclasses.
`none` is the external form of None: the value on the command line, in a ConfigDict and in config.json.
"""

import dataclasses
from typing import Any

from dig_jax.config.averages import length_of
from dig_jax.config.evaluation import EvaluationConfig
from dig_jax.config.field import Group, field, group
from dig_jax.config.objective import AuxiliaryConfig, DiffusionConfig
from dig_jax.config.sampling import SamplingConfig
from dig_jax.config.training import OptimizerConfig, TrainingConfig
from dig_jax.errors import ConfigError, alternatives

_FLOATS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Group, path="config.model"):
    """The denoiser."""

    name: str = field(
        "DiG-S/2",
        "FAMILY-SIZE/PATCH: DiG, DiT or U-DiG; S, B, L or XL. U-DiG has patches of 1: U-DiG-S. DiS: S, B, M,"
        " L, H or WIDTHxDEPTH.",
    )
    patch_size: int | None = field(
        None,
        "Side of a patch, in pixels or, with an autoencoder, in latent pixels; 0: from the name.",
        none=0,
        bounds="positive",
    )
    depth: int | None = field(None, "Number of blocks; 0: from the name.", none=0, bounds="positive")
    hidden_size: int | None = field(
        None,
        "Channels per token, in U-DiG of the first level; 0: from the name.",
        none=0,
        bounds="positive",
    )
    num_heads: int | None = field(
        None,
        "Heads of the token mixer, in U-DiG of the first level; 0: from the name.",
        none=0,
        bounds="positive",
    )
    mlp_hidden_size: int | None = field(
        None,
        "Hidden channels of the MLP; 0: 4 × hidden_size with mlp=gelu, 8/3 × hidden_size with mlp=swiglu, and"
        " that rounded up to a multiple of 256 in DiG and U-DiG; in U-DiG for hidden_size channels.",
        none=0,
        bounds="positive",
    )
    mlp_parts: int = field(
        1,
        "Parts of the tokens that the MLP transforms one after the other: less memory when small models"
        " sample large images, and less memory traffic on TPUs (docs/guide/plan.md; not in DiS).",
        bounds="positive",
    )
    learn_sigma: bool = field(True, "Also predict the variance (Nichol & Dhariwal 2021).")
    implementation: str | None = field(
        None,
        "Implementation of the GLA scan: auto (the best for the device), reference, xla, triton or mosaic"
        " (DiG and U-DiG).",
        none="auto",
        choices=("reference", "xla", "triton", "mosaic"),
    )
    mixer: str = field(
        "gla",
        "Token mixers: gla, softmax, local, or a pattern that repeats, such as gla*3+softmax (DiG and U-DiG;"
        " docs/concepts/models.md).",
    )
    bottleneck_mixer: str | None = field(
        None, "Token mixers of the middle level; empty: as in the others (U-DiG only).", none=""
    )
    window: int = field(
        9,
        "Rows and columns, an odd number, of the tokens that local attention sees (DiG and U-DiG).",
        bounds="positive",
    )
    gate_normalizer: str = field(
        "16",
        "Tokens after which a GLA state is halved at initialization: a number, one per head (16,32,…), grid"
        " (the length of a line of the scan), or spread (per head, from half a line to the whole image; DiG"
        " and U-DiG; docs/concepts/models.md).",
    )
    key_expansion: float = field(
        0.5, "Width of GLA's queries and keys / hidden_size (DiG and U-DiG).", bounds="positive"
    )
    value_expansion: float = field(
        1.0, "Width of GLA's values / hidden_size (DiG and U-DiG).", bounds="positive"
    )
    directions: int = field(4, "Number of scan directions: 4, 2 or 1 (DiG and U-DiG).")
    conv: str | None = field(
        "after",
        "Position of the depthwise 3×3 convolution: after, inside or none (DiG and U-DiG).",
        none="none",
    )
    norm: str = field(
        "layer",
        "Norm in blocks, and of DiT in the final layer: layer (no scale or bias) or rms (with a scale).",
    )
    mlp: str | None = field(
        None,
        "MLP: gelu or swiglu, which in DiT has biases (Yao et al. 2025, LightningDiT); empty: gelu in DiT,"
        " swiglu in DiG and U-DiG.",
        none="",
    )
    positions: str = field(
        "absolute",
        "Coordinates of tokens in images of another size than the training images: absolute, which go on"
        " beyond their size, or interpolated, which are spread over it (not in DiS).",
    )
    drop_path: float = field(
        0.0,
        "Rate at which training drops what the last block adds to an image, and less in earlier blocks"
        " (stochastic depth, Huang et al. 2016; DiS: 0.1); 0: never.",
        bounds="below_one",
    )
    qk_norm: bool = field(False, "RMSNorm of softmax attention's queries and keys (Dehghani et al. 2023).")
    rope: bool = field(
        False, "Rotary positions of softmax attention, beside the fixed positions (Su et al. 2021)."
    )
    time_input: str = field(
        "steps",
        "What the time embedding of DiT gets: steps (0 to 1000), noise (0 to 1, as in REPA) or data (1 to 0,"
        " as in SiT and LightningDiT).",
    )
    class_tokens: int = field(
        0,
        "Number of tokens with the embedding of the label that attention sees beside the image (Li & He 2025,"
        " JiT; DiT only).",
        bounds="nonnegative",
    )
    class_tokens_from: int = field(
        0, "Index of the first block that sees the class tokens (DiT only).", bounds="nonnegative"
    )
    patch_bottleneck: int | None = field(
        None,
        "Channels between the two linear maps of a patch (Li & He 2025, JiT; DiT only); 0: one map.",
        none=0,
        bounds="positive",
    )
    skip: str | None = field(None, "Long skips: none, linear or identity (DiG only).", none="none")
    skip_alignment: str = field(
        "raster", "Token order of long skips: raster, or upstream, as in the released code (DiG only)."
    )
    dtype: str = field(
        "float32", "Dtype of matrix products and activations: float32 or bfloat16.", choices=_FLOATS
    )
    remat: str | None = field(
        None,
        "What the backward pass recomputes: none, dots (all except matrix products), full (group by group of"
        " as many blocks as there are scan directions), or block (block by block: the least memory).",
        none="none",
    )
    internal_head: int | None = field(
        None,
        "Index of the block after which a second final layer predicts, for internal guidance"
        " (docs/concepts/diffusion.md); 0: none.",
        none=0,
        bounds="positive",
    )
    flow_map: bool = field(
        False,
        "Give the network the length of a step and the guidance on it, for diffusion.process=meanflow (not in"
        " DiS).",
    )
    scan_layers: bool = field(
        True,
        "Compile one period of blocks and loop over it. Without the loop the program grows with the depth,"
        " but a GPU step with remat=none is faster, because activations are not copied into stacked arrays.",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig(Group, path="config.data"):
    """The training images."""

    name: str = field(
        "digits",
        "Data source: digits, fake, image_folder, tfds, hub (docs/guide/data.md) or latents"
        " (docs/guide/latents.md).",
    )
    batch_size: int = field(256, "Images per step, over all devices and processes.", bounds="positive")
    flip: bool = field(True, "Mirror half of the images, if mirrored images keep their class.")
    options: dict[str, Any] = field({}, "Keyword arguments of the source.")
    buckets: str = field(
        "",
        "Heights and widths of training images in pixels, such as 256x256,320x192,192x320: each image gets"
        " the size nearest to its shape, and each batch has one size; empty: `image_size` for all"
        " (docs/guide/data.md).",
    )


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Group, path="config.autoencoder"):
    """The autoencoder of models that work on latents."""

    path: str | None = field(
        None,
        "Folder, safetensors file or Hugging Face repository id; empty: the model works on pixels.",
        none="",
    )
    dtype: str = field("float32", "Dtype of matrix products: float32 or bfloat16.", choices=_FLOATS)


@dataclasses.dataclass(frozen=True)
class EncodeConfig(Group, path="config.encode"):
    """`--mode=encode`, which writes latents to `data.options.path`, or features of images."""

    name: str | None = field(None, "Data source of the images, as in `data.name`; empty: none.", none="")
    options: dict[str, Any] = field({}, "Keyword arguments of this source.")
    batch_size: int = field(32, "Images per device and batch.", bounds="positive")
    shard_size: int = field(4096, "Images per file.", bounds="positive")
    dtype: str = field(
        "float32",
        "Dtype of the stored moments: float32, or float16 for half the disk space.",
        choices=("float32", "float16"),
    )
    features: str | None = field(
        None,
        "Write features of the training images to `auxiliary.repa_features` in place of latents:"
        " dinov2_vitb14 or dinov2_vitl14; empty: no.",
        none="",
        choices=("dinov2_vitb14", "dinov2_vitl14"),
    )
    features_weights: str = field("", "File or Hub name of this network's weights.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Group, path="config.checkpoint"):
    """When to save, and which checkpoints to keep."""

    every_steps: int = field(10_000, "Steps between checkpoints.", bounds="positive")
    every_minutes: float | None = field(
        30.0,
        "Maximum time between checkpoints in minutes; 0: no limit.",
        none=0.0,
        bounds="positive",
    )
    keep: int = field(3, "Number of most recent checkpoints to keep.", bounds="positive")
    keep_best: int = field(
        1,
        "Number of best checkpoints to keep by `keep_best_by`; only steps that measure it count.",
        bounds="nonnegative",
    )
    keep_best_by: str = field(
        "heldout_loss",
        "What the best checkpoints are chosen by: heldout_loss, or a figure that `evaluation.every_steps`"
        " measures, such as fid, or frechet_distance of the digits.",
    )
    keep_every_steps: int | None = field(
        100_000,
        "Also keep every checkpoint whose step is a multiple of this; 0: none.",
        none=0,
        bounds="positive",
    )
    checksums: bool = field(
        True,
        "Verify checkpoints on disks by SHA-256, not only by size; in object storage only the size counts.",
    )


@dataclasses.dataclass(frozen=True)
class LoggingConfig(Group, path="config.logging"):
    """When and where to write metrics, in addition to metrics.jsonl."""

    every_steps: int = field(100, "Steps between rows of metrics.", bounds="positive")
    heldout_every_steps: int | None = field(
        5_000, "Steps between measurements of the held-out loss; 0: never.", none=0, bounds="positive"
    )
    tensorboard: bool = field(True, "Write TensorBoard files.")
    wandb: str | None = field(None, "Weights & Biases project; empty: none.", none="")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Group, path="config.mesh"):
    """Number of devices along each mesh axis. One axis may be -1: all remaining devices."""

    data: int = field(-1, "Devices that split a batch; each holds all parameters.")
    fsdp: int = field(1, "Devices that split a batch, and also parameters, averages and moments.")
    tensor: int = field(1, "Devices that split heads and MLP channels.")
    context: int = field(1, "Devices that split each image by rows of tokens.")
    cpu_devices: int = field(
        1,
        "Number of devices that a CPU is split into; one device does not use all cores for small arrays.",
        bounds="devices",
    )

    def __post_init__(self):
        super().__post_init__()
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
            raise ConfigError(
                f"invalid config.mesh.{{data,fsdp,tensor,context}}={','.join(map(str, sizes))}; expected"
                " positive numbers, and at most one -1 for all remaining devices"
            )


@dataclasses.dataclass(frozen=True)
class PlanConfig(Group, path="config.plan"):
    """Settings of --mode=plan."""

    price: float | None = field(
        None,
        "US dollars per chip and hour; 0: the list price, if one is known (docs/guide/plan.md).",
        none=0.0,
        bounds="positive",
    )


@dataclasses.dataclass(frozen=True)
class Config(Group, path="config"):
    """The seed and the initial parameters; the groups below hold all other fields."""

    seed: int = field(0, "Seed of the initialization, data order, noise, timesteps and label dropout.")
    init_from: str | None = field(
        None,
        "Workdir, checkpoint or parameter file to initialize parameters from; empty: random.",
        none="",
    )
    init_partial: bool = field(
        False,
        "With init_from: accept a model with different settings. Parameters whose shapes differ start at"
        " random.",
    )
    init_skip: str = field(
        "",
        "With init_from: patterns of parameters that start at random all the same, such as *.mixer.*,*.conv.*"
        " (docs/guide/checkpoints.md).",
    )
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    diffusion: DiffusionConfig = group(DiffusionConfig)
    auxiliary: AuxiliaryConfig = group(AuxiliaryConfig)
    training: TrainingConfig = group(TrainingConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    logging: LoggingConfig = group(LoggingConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    evaluation: EvaluationConfig = group(EvaluationConfig)
    mesh: MeshConfig = group(MeshConfig)
    autoencoder: AutoencoderConfig = group(AutoencoderConfig)
    encode: EncodeConfig = group(EncodeConfig)
    plan: PlanConfig = group(PlanConfig)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"invalid config.seed={self.seed}; expected a number from 0 to 2³¹ - 1")
        if self.data.batch_size % self.training.accumulation:
            raise ConfigError(
                f"invalid config.data.batch_size={self.data.batch_size}; expected a multiple of"
                f" config.training.accumulation={self.training.accumulation}"
            )
        if self.sampling.ema and (expected := self.expected_average(self.sampling.ema)):
            raise ConfigError(f"invalid config.sampling.ema={self.sampling.ema!r}; expected {expected}")

    def expected_average(self, name: str) -> str | None:
        """Return what is expected instead of an unknown average; None if a run or its checkpoints give it."""
        names = (*self.training.average_names, "params")
        if name in names or (self.training.ema_lengths and length_of(name) is not None):
            return None
        other = ", or length-… with a number below 0.288" if self.training.ema_lengths else ""
        return alternatives(names) + other

    @property
    def sampled_ema(self) -> str:
        """Name of the average to sample from: `sampling.ema`, or the first average."""
        return self.sampling.ema or self.training.average_names[0]
