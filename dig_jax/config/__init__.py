"""The configuration of a run: frozen dataclasses, and their conversion from and to ConfigDicts and JSON."""

from dig_jax.config.conversion import (
    announced_changes,
    check_field,
    check_same,
    flattened,
    from_dict,
    read_settings,
    to_dict,
)
from dig_jax.config.fields import (
    AutoencoderConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EncodeConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PlanConfig,
    SamplingConfig,
    TrainingConfig,
)
from dig_jax.config.objective import AuxiliaryConfig, DiffusionConfig

__all__ = [
    "AutoencoderConfig",
    "AuxiliaryConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "EncodeConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "SamplingConfig",
    "TrainingConfig",
    "announced_changes",
    "check_field",
    "check_same",
    "flattened",
    "from_dict",
    "read_settings",
    "to_dict",
]
