"""The parts of a train step."""

import dataclasses
from collections.abc import Callable, Mapping

import optax
from jaxtyping import Array, Float, Key

from dig_jax.components import Components, ModelSpec, Params
from dig_jax.diffusion import MeanFlow
from dig_jax.errors import ConfigError, naming_setting
from dig_jax.training.ema import Average, make_averages
from dig_jax.training.objectives import denoising, mean_flow
from dig_jax.training.objectives.auxiliary import AuxiliaryObjective, make_auxiliary
from dig_jax.training.optimizer import make_optimizer, make_schedule

Objective = Callable[
    [Components, Params, denoising.Batch, Key[Array, ""], int],
    tuple[Float[Array, ""], denoising.Metrics],
]
"""(components, params, micro-batch, key, batch size) -> (loss, metrics), as `denoising.loss`."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainSetup:
    """The parts of a train step, except the state and the batch.

    Attributes:
        components: model and diffusion process.
        optimizer: turns gradients into updates.
        schedule: learning rate by number of updates, for the metrics.
        averages: averages of the parameters by name.
        objective: the loss of a micro-batch.
        auxiliary: replaces the objective, up to step `auxiliary.until`; None does not.
        lasting: replaces the objective after this step.
        teacher: name of the average that auxiliary losses use as their teacher.
        distilled: the trained model to distill, whose parameters the step gets; None: none.
    """

    components: Components
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    averages: Mapping[str, Average]
    objective: Objective = denoising.loss
    auxiliary: AuxiliaryObjective | None = None
    lasting: AuxiliaryObjective | None = None
    teacher: str = ""
    distilled: ModelSpec | None = None

    @classmethod
    def of(
        cls, components: Components, distilled: ModelSpec | None = None, images_offset: int = 0
    ) -> "TrainSetup":
        """Return the setup that a config describes.

        Args:
            components: model and diffusion process.
            distilled: the trained model to distill.
            images_offset: the number of images so far, less the number that all steps so far would have had
                with the current batch size; 0 unless the batch size has changed.
        """
        settings = components.config
        return cls(
            components,
            make_optimizer(settings.optimizer, settings.training.steps),
            make_schedule(settings.optimizer, settings.training.steps),
            make_averages(settings, images_offset),
            _objective(components),
            *make_auxiliary(components),
            settings.training.average_names[0],
            distilled,
        )


def _objective(components: Components) -> Objective:
    """Return the objective of the config's process.

    Raises:
        ConfigError: settings that do not fit together.
    """
    settings, process = components.config, components.diffusion
    is_mean_flow = isinstance(process, MeanFlow)
    with naming_setting("config.model.flow_map"):
        if is_mean_flow != settings.model.flow_map:
            raise ValueError(
                f"invalid flow_map={not is_mean_flow} for process={settings.diffusion.process}; expected"
                f" {is_mean_flow}"
            )
    if not is_mean_flow:
        return denoising.loss
    guides = process.guidance_max > 1 and components.image_spec.num_classes
    if guides and not components.has_trained_null_class:
        raise ConfigError(
            f"unsupported config.diffusion.guidance_max={process.guidance_max:g} with"
            " config.training.label_dropout=0, which trains no null class to guide away from; expected 1"
        )
    return mean_flow.loss
