"""The components's settings as frozen, checked dataclasses; nothing below this module knows ml_collections.

Every field is described, with its unit and source, in configs/base.py. A field that came later has its
default here too: the configs of older runs lack it.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dig_jax.errors import ConfigError, suggest


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which denoiser; 0 and "none" leave a choice to the name."""

    name: str
    patch_size: int
    depth: int
    hidden_size: int
    num_heads: int
    learn_sigma: bool
    directions: int
    conv: str
    norm: str
    skip: str
    skip_alignment: str
    dtype: str
    remat: str

    def __post_init__(self):
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        not_negative("model", self, "patch_size", "depth", "hidden_size", "num_heads")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how many per step."""

    name: str
    batch_size: int
    flip: bool
    options: dict[str, Any]

    def __post_init__(self):
        positive("data", self, "batch_size")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What stands between pictures and the images that the model sees."""

    path: str = ""
    dtype: str = "float32"

    def __post_init__(self):
        one_of("autoencoder.dtype", self.dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class EncodeConfig:
    """Which pictures --mode=encode makes latents of, and how they are stored."""

    name: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 32
    shard_size: int = 4096
    dtype: str = "float32"

    def __post_init__(self):
        positive("encode", self, "batch_size", "shard_size")
        one_of("encode.dtype", self.dtype, ("float32", "float16"))


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and the loss."""

    schedule: str
    num_steps: int
    loss: str


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long, and what is done per step beside the optimiser."""

    steps: int
    accumulation: int
    label_dropout: float
    ema_decays: tuple[float, ...]

    def __post_init__(self):
        not_negative("training", self, "steps")
        positive("training", self, "accumulation")
        fraction("training", self, "label_dropout")
        decays = self.ema_decays
        if not decays or len(set(decays)) < len(decays) or not all(0 <= decay <= 1 for decay in decays):
            raise ConfigError(
                f"config.training.ema_decays={decays} must be one or more different numbers between 0 and 1"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate over time."""

    learning_rate: float
    warmup_steps: int
    schedule: str
    final_fraction: float
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self):
        one_of("optimizer.schedule", self.schedule, ("constant", "cosine", "linear"))
        positive("optimizer", self, "learning_rate")
        fraction("optimizer", self, "final_fraction", "b1", "b2")
        not_negative("optimizer", self, "warmup_steps", "weight_decay", "clip_norm")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int
    every_minutes: float
    keep: int
    keep_best: int
    keep_every_steps: int

    def __post_init__(self):
        positive("checkpoint", self, "every_steps", "keep")
        not_negative("checkpoint", self, "every_minutes", "keep_best", "keep_every_steps")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """When to write metrics, and where besides metrics.jsonl."""

    every_steps: int
    heldout_every_steps: int
    tensorboard: bool
    wandb: str = ""

    def __post_init__(self):
        positive("logging", self, "every_steps")
        not_negative("logging", self, "heldout_every_steps")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn, in training and by --mode=sample."""

    every_steps: int
    images_per_class: int
    sampler: str
    steps: int
    guidance_scale: float
    guidance_channels: int
    clip: bool
    ema: str
    batch_size: int

    def __post_init__(self):
        positive("sampling", self, "images_per_class", "steps", "batch_size")
        not_negative("sampling", self, "every_steps", "guidance_scale", "guidance_channels")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How many images the scores are computed from."""

    num_images: int

    def __post_init__(self):
        not_negative("evaluation", self, "num_images")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; one of them may be -1: all that the others leave."""

    data: int
    fsdp: int
    tensor: int
    context: int
    cpu_devices: int

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
            raise ConfigError(
                "config.mesh.{data,fsdp,tensor,context} must be positive, and one of them may be -1 for all"
                f" devices that the others leave; they are {', '.join(map(str, sizes))}"
            )
        positive("mesh", self, "cpu_devices")


@dataclasses.dataclass(frozen=True)
class Config:
    """One components."""

    seed: int
    init_from: str
    model: ModelConfig
    data: DataConfig
    diffusion: DiffusionConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    mesh: MeshConfig
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    encode: EncodeConfig = dataclasses.field(default_factory=EncodeConfig)

    def __post_init__(self):
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"config.seed={self.seed} is not in 0…2³¹-1")
        if self.data.batch_size % self.training.accumulation:
            raise ConfigError(
                f"config.data.batch_size={self.data.batch_size} is not a multiple of"
                f" config.training.accumulation={self.training.accumulation}"
            )
        if self.sampling.ema:
            one_of("sampling.ema", self.sampling.ema, (*map(str, self.training.ema_decays), "params"))

    @property
    def sampled_ema(self) -> str:
        """The average to sample from: the one that `sampling` names, else the first."""
        return self.sampling.ema or str(self.training.ema_decays[0])


def from_dict(settings: Mapping[str, Any]) -> Config:
    """The dataclasses of a ConfigDict, or of the nested dict in a workdir's config.json.

    Raises:
        ConfigError: a field is unknown, missing, of a wrong type or of an impossible value.
    """
    return _build(Config, settings, "config")


def read_settings(path: Path) -> Config:
    """The settings that stand in a workdir's config.json.

    Raises:
        ConfigError: it cannot be read, or another version of the program wrote it.
    """
    try:
        stored = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; delete it, checkpoints hold a copy") from error
    try:
        return from_dict(stored)
    except ConfigError as error:
        raise ConfigError(f"{path} is of another version of this program, or was changed: {error}") from error


# A workdir goes on only with the settings it began with, these excepted. Data may move: their fingerprint is
# compared too, and latents know the autoencoder that made them.
_CHANGEABLE = ("training.steps", "logging", "checkpoint", "sampling", "evaluation", "mesh")
_CHANGEABLE += ("autoencoder", "encode")
_PLACES = ("path", "heldout_path", "data_dir", "dataset", "cache_dir")
_CHANGEABLE += tuple(f"data.options.{name}" for name in _PLACES)


def check_same(old: Config, new: Config, workdir: object) -> None:
    """Raises unless only settings that may change differ.

    Raises:
        ConfigError: names the settings, as "field: old → new".
    """
    old_fields, new_fields = flattened(dataclasses.asdict(old)), flattened(dataclasses.asdict(new))
    changed = [
        f"{name}: {old_fields.get(name)!r} → {new_fields.get(name)!r}"
        for name in sorted(old_fields | new_fields)
        if old_fields.get(name) != new_fields.get(name)
        and name not in _CHANGEABLE
        and name.split(".")[0] not in _CHANGEABLE
    ]
    if changed:
        raise ConfigError(
            f"{workdir} began with other settings: {'; '.join(changed)}."
            " Take another --workdir, or these settings again"
        )


def positive(group: str, settings: Any, *fields: str) -> None:
    """Raises unless all of these fields are > 0."""
    _require(group, settings, fields, lambda value: value > 0, "positive")


def not_negative(group: str, settings: Any, *fields: str) -> None:
    """Raises unless all of these fields are ≥ 0."""
    _require(group, settings, fields, lambda value: value >= 0, "zero or more")


def fraction(group: str, settings: Any, *fields: str) -> None:
    """Raises unless all of these fields are in 0…1."""
    _require(group, settings, fields, lambda value: 0 <= value <= 1, "between 0 and 1")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises unless value is one of the choices."""
    if value not in choices:
        raise ConfigError(f"config.{name}={value!r} is none of {', '.join(choices)}{suggest(value, choices)}")


def check_field(path: str, name: str, known: Iterable[str]) -> None:
    """Raises, and suggests the nearest or lists all, unless `name` is one of the known fields of `path`."""
    if name not in known:
        hint = suggest(name, known) or f"; it has {', '.join(known) or 'none'}"
        raise ConfigError(f"{path} has no field {name!r}{hint}")


def _require(
    group: str, settings: Any, fields: tuple[str, ...], allowed: Callable[[float], bool], what: str
) -> None:
    for field in fields:
        value = getattr(settings, field)
        if not (allowed(value) and math.isfinite(value)):
            raise ConfigError(f"config.{group}.{field}={value} is not {what}")


def _build(cls: type, settings: Any, path: str) -> Any:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path}={settings!r} is no group of fields")
    fields = typing.get_type_hints(cls)
    for name in settings:
        check_field(path, name, fields)
    missing = dataclasses.MISSING
    required = {f.name for f in dataclasses.fields(cls) if f.default is missing is f.default_factory}
    values = {}
    for name, kind in fields.items():
        if name not in settings:
            if name in required:
                raise ConfigError(f"{path}.{name} is missing")
            continue
        value, here = settings[name], f"{path}.{name}"
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value, here)
        else:
            values[name] = _checked(value, kind, here)
    return cls(**values)


def _checked(value: Any, kind: Any, path: str) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_checked(item, typing.get_args(kind)[0], path) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not origin:
        raise ConfigError(f"{path}={value!r} is not of type {getattr(kind, '__name__', kind)}")
    return value


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
