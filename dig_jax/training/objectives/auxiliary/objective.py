"""The denoising loss with auxiliary terms.

All terms see one forward pass on the images, times, noise and dropped labels of the denoising loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dig_jax.components import Components, ModelSpec, Params, model_options
from dig_jax.config import Config
from dig_jax.diffusion import FlowMatching, MeanFlow
from dig_jax.errors import naming_setting
from dig_jax.models.backbone import Outputs
from dig_jax.models.options import ModelOptions
from dig_jax.training.objectives.auxiliary import losses
from dig_jax.training.objectives.auxiliary.heads import Heads, bind_heads, features_shape, noise_level
from dig_jax.training.objectives.denoising import Batch, Draw, Metrics, draw, metrics_of

Frozen = tuple[ModelSpec, Params]
"""A model that is only evaluated, and its parameters."""

_TEACHER_DISTANCE = 0.2  # greatest difference between the times of student and teacher (SRA)


class Forward(NamedTuple):
    """One forward pass of the model, and what it started from.

    Attributes:
        scale: weight of each image's loss by the learned variance, without a gradient.
        teacher: the average of the parameters that is SRA's teacher.
        distilled: the trained model to distill, or None.
        key: the step's key.
    """

    components: Components
    heads: Heads
    batch: Batch
    drawn: Draw
    x_t: Float[Array, "b h w c"]
    outputs: Outputs
    scale: Float[Array, " b"]
    teacher: Params
    distilled: Frozen | None
    key: Key[Array, ""]

    def denoising(self, output: Float[Array, "b h w out"]) -> Float[Array, " b"]:
        """Return the denoising loss of each image for a prediction."""
        x0, noise, times = self.batch["image"], self.drawn.noise, self.drawn.times
        return self.components.diffusion.loss(output, x0=x0, noise=noise, x_t=self.x_t, times=times)["loss"]


@dataclasses.dataclass(frozen=True)
class AuxiliaryObjective:
    """The denoising loss plus weighted terms. It is an `Objective` once its teacher is bound.

    Attributes:
        weights: the weight of each term, by name in `TERMS`.
    """

    weights: Mapping[str, float]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics in addition to those of `denoising.loss`."""
        return tuple(f"{name}_loss" for name in self.weights)

    def __call__(
        self,
        components: Components,
        params: Params,
        batch: Batch,
        key: Key[Array, ""],
        batch_size: int,
        *,
        teacher: Params,
        distilled: Frozen | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the share of a micro-batch in the loss of the batch, and its metrics.

        Args:
            components: model, process and, for REPA, features.
            params: parameters of the model and of the heads.
            batch: as for `denoising.loss`.
            key: the step's key, which draws what it draws for `denoising.loss`.
            batch_size: number of images of the batch.
            teacher: the average of the parameters that is SRA's teacher.
            distilled: the trained model to distill.

        Returns:
            The sum of all terms, and the metrics of `denoising.loss` with an unweighted "NAME_loss" per term.
        """
        process, heads = components.diffusion, bind_heads(components, params)
        drawn = draw(components, key, batch["index"], batch["image"].shape[1:])
        x_t = process.corrupt(batch["image"], drawn.noise, drawn.times)
        blocks = {block for name in self.weights for block in _student_blocks(components.config, name)}
        timesteps = process.timestep_input(drawn.times)
        outputs = components.model_spec.outputs(
            params, x_t, timesteps, batch["label"], drawn.drop, tuple(sorted(blocks)), kept=drawn.kept
        )
        log_variance = jnp.zeros(drawn.times.shape)
        if heads.log_variance is not None:
            log_variance = heads.log_variance(noise_level(process, drawn.times))
        scale = jnp.exp(-jax.lax.stop_gradient(log_variance))
        forward = Forward(components, heads, batch, drawn, x_t, outputs, scale, teacher, distilled, key)
        values = forward.denoising(outputs.output)
        total = jnp.sum(values * jnp.exp(-log_variance) + log_variance) / batch_size
        metrics = metrics_of(components, drawn, values, batch_size)
        share = len(batch["index"]) / batch_size
        for name, weight in self.weights.items():
            term = share * jnp.mean(TERMS[name](forward))
            total += weight * term
            metrics[f"{name}_loss"] = term
        return total, metrics


def _internal(forward: Forward) -> Float[Array, " b"]:
    assert forward.outputs.internal is not None
    return forward.scale * forward.denoising(forward.outputs.internal)


def _dispersive(forward: Forward) -> Float[Array, " groups"]:
    settings = forward.components.config.auxiliary
    tokens = forward.outputs.hidden[settings.dispersive_block]
    return losses.dispersive(
        tokens, group=settings.dispersive_group, temperature=settings.dispersive_temperature
    )


def _contrastive(forward: Forward) -> Float[Array, " b"]:
    process, drawn = forward.components.diffusion, forward.drawn
    assert isinstance(process, FlowMatching)
    return forward.scale * losses.contrastive(
        process,
        forward.outputs.output,
        x0=forward.batch["image"],
        noise=drawn.noise,
        times=drawn.times,
    )


def _sra(forward: Forward) -> Float[Array, " b"]:
    """Compare with the teacher's later block on the same noise, with less of it, and the same labels."""
    components, batch, drawn = forward.components, forward.batch, forward.drawn
    process, settings = components.diffusion, components.config.auxiliary

    def fraction(index: Array) -> Array:
        # `draw` takes the children 0, 1 and 2 of this key.
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(forward.key, index), 3))

    times = process.earlier(drawn.times, _TEACHER_DISTANCE * jax.vmap(fraction)(batch["index"]))
    seen = components.model_spec.outputs(
        forward.teacher,
        process.corrupt(batch["image"], drawn.noise, times),
        process.timestep_input(times),
        batch["label"],
        drawn.drop,
        (settings.sra_teacher_block,),
    )
    assert forward.heads.sra is not None
    student = forward.heads.sra(forward.outputs.hidden[settings.sra_block])
    return losses.smooth_l1(student, seen.hidden[settings.sra_teacher_block])


def _repa(forward: Forward) -> Float[Array, " b"]:
    components, batch, grid = forward.components, forward.batch, _grid(forward.components)
    assert forward.heads.repa is not None
    tokens = forward.outputs.hidden[components.config.auxiliary.repa_block]
    if "features" in batch:
        features = losses.at_grid(batch["features"], grid)
    else:
        assert components.features is not None
        features = components.features(batch["image"])
    return losses.representation(forward.heads.repa(tokens, grid), features)


def _distill(forward: Forward) -> Float[Array, " b"]:
    """Compare with another model on the same noisy images and labels."""
    batch, drawn = forward.batch, forward.drawn
    assert forward.distilled is not None
    spec, params = forward.distilled
    timesteps = forward.components.diffusion.timestep_input(drawn.times)
    output = spec.denoise(params, forward.x_t, timesteps, batch["label"], drawn.drop)
    return losses.distillation(forward.outputs.output, output, channels=forward.x_t.shape[-1])


TERMS: Mapping[str, Callable[[Forward], Float[Array, " n"]]] = {
    "internal": _internal,
    "dispersive": _dispersive,
    "contrastive": _contrastive,
    "sra": _sra,
    "repa": _repa,
    "distill": _distill,
}
"""The terms by name; each returns values whose mean over a micro-batch is the term."""


def make_auxiliary(components: Components) -> tuple[AuxiliaryObjective | None, AuxiliaryObjective | None]:
    """Return the objectives of the steps up to `auxiliary.until`, and of the steps after it.

    None stands for the denoising loss alone. The second one keeps the terms without which the model's own
    parts would not be trained: the internal head and the learned variance.

    Raises:
        ConfigError: a field is invalid or does not fit the model, the process or the batch.
    """
    settings, model = components.config.auxiliary, components.config.model
    lasting = {} if model.internal_head is None else {"internal": settings.internal_weight}
    named = {name: getattr(settings, f"{name}_weight") for name in TERMS if name != "internal"}
    all_terms = lasting | {name: weight for name, weight in named.items() if weight}
    with naming_setting("config.auxiliary"):
        _check(components, all_terms)

    def objective(weights: Mapping[str, float]) -> AuxiliaryObjective | None:
        return AuxiliaryObjective(weights) if weights or settings.log_variance else None

    return objective(all_terms), objective(lasting)


def _student_blocks(config: Config, name: str) -> tuple[int, ...]:
    """Return the blocks that a term needs from the student."""
    block = getattr(config.auxiliary, f"{name}_block", None)
    return () if block is None else (block,)


def _grid(components: Components) -> tuple[int, int]:
    """Return (rows, columns) of tokens of a training image after REPA's block."""
    height, width, _ = components.image_spec.image_shape
    options = model_options(components.config.model)[1]
    side = options.patch_size * options.level_of(components.config.auxiliary.repa_block).stride
    return -(-height // side), -(-width // side)


def _check(components: Components, weights: Mapping[str, float]) -> None:
    config, depth = components.config, model_options(components.config.model)[1].depth
    settings = config.auxiliary
    names = [*weights, *(["log_variance"] if settings.log_variance else [])]
    if names and isinstance(components.diffusion, MeanFlow):
        raise ValueError(
            f"unsupported losses of diffusion.process=meanflow: got {', '.join(names)}; expected none, and no"
            " model.internal_head"
        )
    blocks = {f"{name}_block": block for name in weights for block in _student_blocks(config, name)}
    if "sra" in weights:
        blocks["sra_teacher_block"] = settings.sra_teacher_block
    for name, block in blocks.items():
        if block >= depth:
            raise ValueError(f"invalid {name}={block}; expected at most {depth - 1}, the last block")
    if "sra" in weights:
        _check_teacher(model_options(config.model)[1], settings.sra_block, settings.sra_teacher_block)
    size = config.data.batch_size // config.training.accumulation
    if "dispersive" in weights and size % settings.dispersive_group:
        raise ValueError(
            f"invalid dispersive_group={settings.dispersive_group}; expected a divisor of {size}, the images"
            " of a micro-batch"
        )
    if "contrastive" in weights and not isinstance(components.diffusion, FlowMatching):
        raise ValueError(
            f"unsupported contrastive_weight={settings.contrastive_weight}; expected 0, or"
            " config.diffusion.process=flow"
        )
    if "contrastive" in weights and size == 1:
        raise ValueError(
            f"invalid contrastive_weight={settings.contrastive_weight}; expected 0 for micro-batches of one"
            " image"
        )
    if "repa" in weights:
        _check_features(components)
    if "distill" in weights and settings.distill_from is None:
        raise ValueError(
            f"unsupported distill_weight={settings.distill_weight} without distill_from; expected the"
            " workdir, checkpoint or parameter file of a trained model"
        )


def _check_teacher(options: ModelOptions, student: int, teacher: int) -> None:
    seen = [(level.width, level.stride) for level in map(options.level_of, (student, teacher))]
    if seen[0] != seen[1]:
        raise ValueError(
            f"unsupported sra_teacher_block={teacher} with sra_block={student}: got blocks of different"
            " levels; expected blocks with the same width and grid"
        )


def _check_features(components: Components) -> None:
    weight, (rows, columns) = components.config.auxiliary.repa_weight, _grid(components)
    if (stored := components.stored_features) is not None:
        height, width, _ = stored.shape
        if height * columns != width * rows:
            raise ValueError(
                f"invalid repa_features={stored.path}: got a grid of {height} × {width}; expected {rows} ×"
                f" {columns}, as in the model, or another one of the same shape"
            )
        return
    if components.features is None:
        raise ValueError(
            f"unsupported repa_weight={weight} without features; set config.auxiliary.repa_features, or pass"
            " an encoder to dig_jax.training.train.train(..., features=ENCODER)"
        )
    if (tokens := features_shape(components)[0]) != rows * columns:
        raise ValueError(
            f"invalid features for repa_weight={weight}: got {tokens} tokens per image; expected"
            f" {rows} × {columns}, as in the model"
        )
