"""The fields of training and of the optimizer, as in `fields.py`."""

import dataclasses

from dig_jax.config.averages import LONGEST, average_of_length
from dig_jax.config.field import Group, field
from dig_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Group, path="config.training"):
    """Length of training, and options of the train step."""

    steps: int = field(400_000, "Number of optimizer steps.", bounds="nonnegative")
    accumulation: int = field(1, "Micro-batches per step (gradient accumulation).", bounds="positive")
    max_skipped_steps: int = field(
        100,
        "Skipped steps in a row (loss, gradient or update was not finite) after which the run ends.",
        bounds="positive",
    )
    label_dropout: float = field(
        0.1, "Fraction of labels replaced by the null class (Ho & Salimans 2022).", bounds="fraction"
    )
    ema_decays: tuple[float, ...] = field(
        (0.9999,),
        "Decays of exponential moving averages of the parameters, each named by its decay; sampling uses the"
        " first average.",
    )
    ema_half_lives: tuple[int, ...] = field(
        (),
        "Half-lives of further exponential averages, in images (Karras et al. 2022); their names are such as"
        " half-life-500000.",
    )
    ema_rampup: float | None = field(
        0.05,
        "Limits a half-life to this fraction of the images seen (Karras et al. 2022); 0: no limit.",
        none=0.0,
        bounds="positive",
    )
    ema_lengths: tuple[float, ...] = field(
        (),
        "Relative lengths of power-function averages (Karras et al. 2024), such as 0.05 and 0.1; their names"
        " are such as length-0.05. Their checkpoints also give averages of other lengths"
        " (docs/guide/checkpoints.md).",
    )

    def __post_init__(self):
        super().__post_init__()
        allowed = {
            "ema_decays": ("numbers between 0 and 1", lambda decay: 0 <= decay <= 1),
            "ema_half_lives": ("numbers of images", lambda images: images > 0),
            "ema_lengths": ("numbers between 0 and 0.288", lambda length: 0 < length < LONGEST),
        }
        for name, (expected, is_allowed) in allowed.items():
            values = getattr(self, name)
            if len(set(values)) < len(values) or not all(map(is_allowed, values)):
                raise ConfigError(f"invalid config.training.{name}={values}; expected distinct {expected}")
        if not self.average_names:
            raise ConfigError(
                "invalid config.training.ema_decays=(); expected one or more distinct numbers between 0"
                " and 1, or ema_half_lives or ema_lengths"
            )

    @property
    def average_names(self) -> tuple[str, ...]:
        """Names of the averages of the parameters, in checkpoints and in `sampling.ema`."""
        return (
            *map(str, self.ema_decays),
            *(f"half-life-{images}" for images in self.ema_half_lives),
            *map(average_of_length, self.ema_lengths),
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Group, path="config.optimizer"):
    """AdamW and its learning rate schedule."""

    learning_rate: float = field(1e-4, "Peak learning rate.", bounds="positive")
    warmup_steps: int = field(0, "Steps of linear warm-up.", bounds="nonnegative")
    schedule: str = field(
        "constant",
        "Learning rate after the warm-up: constant, or a cosine or linear decay until `training.steps`.",
        choices=("constant", "cosine", "linear"),
    )
    final_fraction: float = field(
        0.0, "Final learning rate of a cosine or linear decay, as a fraction of the peak.", bounds="fraction"
    )
    b1: float = field(0.9, "Decay of the first moment of the gradient.", bounds="below_one")
    b2: float = field(0.999, "Decay of the second moment of the gradient.", bounds="below_one")
    weight_decay: float = field(0.0, "Decoupled weight decay.", bounds="nonnegative")
    clip_norm: float | None = field(
        None, "Maximum global norm of the gradient; 0: no clipping.", none=0.0, bounds="positive"
    )
