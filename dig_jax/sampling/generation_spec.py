"""The static values that drawing images depends on, from a config's `sampling` and a call's options."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from dig_jax.components import Components, ModelSpec
from dig_jax.config import SamplingConfig
from dig_jax.diffusion import (
    BaseSampler,
    FlowMatching,
    Guidance,
    MeanFlow,
    Process,
    make_rule,
    make_sampler,
)
from dig_jax.diffusion.guidance import GUIDED, PLAIN, ZERO, Perturbed
from dig_jax.diffusion.samplers import LoopSampler
from dig_jax.diffusion.samplers.dopri5 import MOMENTUM
from dig_jax.diffusion.samplers.mean_flow import MeanFlowSampler
from dig_jax.errors import suggest
from dig_jax.models.isolation import isolate_tokens
from dig_jax.sampling.feature_cache import CacheSpec

# Fields of `sampling` that a call may replace.
OPTIONS = (
    "sampler",
    "sampler_options",
    "steps",
    "time_shift",
    "clip",
    "guidance",
    "guidance_options",
    "guidance_scale",
    "guidance_channels",
    "guidance_interval",
    "guidance_rescale",
    "internal_guidance_scale",
    "cache_interval",
    "cache_order",
    "weak_model",
)


def with_options(settings: SamplingConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `sampling` with the options that are not None in place of the config's.

    Another sampler or guidance rule starts without the config's options for the first one. Numbers of NumPy
    become Python's.

    Raises:
        ValueError: an unknown option.
    """
    for name in options:
        if name not in OPTIONS:
            raise ValueError(
                f"unknown option: got {name!r}; expected one of {', '.join(OPTIONS)}{suggest(name, OPTIONS)}"
            )
    given = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in options.items()
        if value is not None
    }
    fields = vars(settings)
    for name in ("sampler", "guidance"):
        if given.get(name, fields[name]) != fields[name]:
            given.setdefault(f"{name}_options", {})
    return {**fields, **given}


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """The static values of `generate`: they compare and hash by value and can be pickled.

    Equal specs share one compiled program, and an exporter can store the spec with the program.

    Attributes:
        model: the network.
        process: the diffusion process that the network was trained on, with the times of sampling.
        sampler: the sampler with its options.
        shape: (height, width, channels) of an image in the model's space.
        guidance: the guidance, or None for none.
        learned: interval of times with the guidance that a flow map has learned, and whose scale is an input
            of the network; None for other models.
        weak: the weaker model of autoguidance.
        internal_scale: scale of internal guidance; 1 is none.
        cache: feature caching between steps, or None for none.
        trajectory: return the images predicted at every step instead of the final images.
    """

    model: ModelSpec
    process: Process
    sampler: BaseSampler
    shape: tuple[int, int, int]
    guidance: Guidance | None = None
    learned: tuple[float, float] | None = None
    weak: ModelSpec | None = None
    internal_scale: float = 1.0
    cache: CacheSpec | None = None
    trajectory: bool = False

    def kinds(self, fractions: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the kind of evaluation at each time of the process: the number of networks that it runs."""
        return np.full(len(fractions), PLAIN) if self.guidance is None else self.guidance.kinds(fractions)

    @property
    def guided(self) -> bool:
        """Whether the images depend on the scale of guidance."""
        return self.guidance is not None or (self.learned is not None and self.model.num_classes > 0)

    @property
    def evaluations_by_network(self) -> dict[str, int] | None:
        """How often each network is evaluated for one image; None: only a run tells.

        A step with a null class or a perturbed mixer evaluates the model twice; autoguidance evaluates the
        weaker model too.
        """
        if not isinstance(self.sampler, LoopSampler):
            return None
        kinds = self.kinds(self.sampler.fractions(self.process))
        if self.guidance is None:
            return {"model": len(kinds)}
        counts = {"model": int(np.sum(kinds != ZERO))}
        weak = "model" if self.weak is None else "weaker model"
        return counts | {weak: counts.get(weak, 0) + int(np.sum(kinds == GUIDED))}

    @property
    def evaluations(self) -> int | None:
        """How often networks are evaluated for one image (NFE); None: only a run tells."""
        counts = self.evaluations_by_network
        return None if counts is None else sum(counts.values())

    @classmethod
    def of(
        cls,
        components: Components,
        *,
        shape: tuple[int, int, int] | None = None,
        weak: ModelSpec | None = None,
        trajectory: bool = False,
        **options: Any,
    ) -> "GenerationSpec":
        """Return the spec that a config's `sampling` describes.

        Models without classes are never guided away from the null class.

        Args:
            components: model, process and images.
            shape: as the attribute; by default of the training images.
            weak: the weaker model, if the guidance rule needs one.
            trajectory: as the attribute.
            options: fields of `sampling` that replace the config's; None keeps it.

        Raises:
            ValueError: an option is unknown, invalid, or unsupported by the process or the model.
        """
        fields = with_options(components.config.sampling, options)
        sampler = _sampler(fields, components)
        if trajectory and not isinstance(sampler, LoopSampler):
            raise ValueError(
                f"unsupported sampler of a trajectory: got {fields['sampler']!r}; expected one with a number"
                " of steps"
            )
        shape = shape or components.image_spec.image_shape
        guidance = _guidance(fields, components)
        if guidance is not None and guidance.rule.remembers and not isinstance(sampler, LoopSampler):
            raise ValueError(MOMENTUM)
        needs_weak = guidance is not None and guidance.rule.weak == "model"
        if needs_weak and weak is None:
            raise ValueError("missing weak_model: guidance 'autoguidance' expects a weaker model's workdir")
        scale = float(fields["internal_guidance_scale"])
        if scale != 1 and components.config.model.internal_head is None:
            raise ValueError(
                f"unsupported internal_guidance_scale={scale}; expected 1, or a model with"
                " config.model.internal_head"
            )
        return cls(
            model=components.model_spec,
            process=_shifted(fields, sampler, components, shape),
            sampler=sampler,
            shape=shape,
            guidance=guidance,
            learned=_learned(fields, sampler, components),
            weak=weak if needs_weak else None,
            internal_scale=scale,
            cache=_cache(fields, sampler, components),
            trajectory=trajectory,
        )


def needs_weak_model(fields: Mapping[str, Any]) -> bool:
    """Return whether these fields of `sampling` describe guidance by a weaker model."""
    return fields["guidance_scale"] != 1 and make_rule(fields["guidance"]).weak == "model"


def _sampler(fields: Mapping[str, Any], components: Components) -> BaseSampler:
    sampler = make_sampler(
        fields["sampler"], steps=fields["steps"], clip=fields["clip"], **fields["sampler_options"]
    )
    sampler.check(components.diffusion)
    if sampler.clip and components.config.autoencoder.path is not None:
        raise ValueError("unsupported clip of latents, which are not limited to [-1, 1]; expected False")
    return sampler


def _shifted(
    fields: Mapping[str, Any], sampler: BaseSampler, components: Components, shape: tuple[int, int, int]
) -> Process:
    """Return the process with the times of sampling moved toward noise.

    An image with n times as many tokens shows √n times less noise at the same t/(1 - t): Esser et al. 2024,
    equation 23.
    """
    process, shift = components.diffusion, fields["time_shift"]
    if shift == 1:
        return process
    if not isinstance(process, FlowMatching) or sampler.own_times:
        where = f"sampler={fields['sampler']!r}" if isinstance(process, FlowMatching) else "process=ddpm"
        raise ValueError(
            f"unsupported time_shift={shift or 0:g} with {where}; expected 1, or flow matching with a sampler"
            " that has no times of its own"
        )
    if not shift:  # None in the config, 0 in a call
        trained = components.image_spec.image_shape
        shift = math.sqrt(shape[0] * shape[1] / (trained[0] * trained[1]))
    if not shift > 0:
        raise ValueError(f"invalid time_shift={shift}; expected zero or a positive number")
    times = dataclasses.replace(process.times, shift=shift * process.times.shift)
    return dataclasses.replace(process, times=times)


def _cache(fields: Mapping[str, Any], sampler: BaseSampler, components: Components) -> CacheSpec | None:
    if fields["cache_interval"] == 1:
        return None
    if not isinstance(sampler, LoopSampler) or sampler.evaluations_per_step > 1:
        raise ValueError(
            f"unsupported cache_interval={fields['cache_interval']} with sampler={fields['sampler']!r};"
            " expected 1, or a sampler with one evaluation per step"
        )
    for what, lacks in {
        "DiS": components.abstract_model.family == "DiS",
        "a flow map": components.abstract_model.options.flow_map,
    }.items():
        if lacks:
            raise ValueError(f"unsupported cache_interval={fields['cache_interval']} of {what}; expected 1")
    return CacheSpec(fields["cache_interval"], fields["cache_order"])


def _learned(
    fields: Mapping[str, Any], sampler: BaseSampler, components: Components
) -> tuple[float, float] | None:
    """Return the interval of times with the guidance that a flow map has learned; None for other models.

    Raises:
        ValueError: guidance that training does not cover.
    """
    process, scale = components.diffusion, fields["guidance_scale"]
    if not isinstance(process, MeanFlow):
        return None
    largest = process.guidance_max if components.image_spec.num_classes else math.inf
    if not 1 <= scale <= largest:
        raise ValueError(
            f"unsupported guidance_scale={scale:g} of process=meanflow; expected 1 to {largest:g}, the scales"
            " of training (diffusion.guidance_max)"
        )
    plain = {"guidance": "classifier_free", "guidance_rescale": 0, "guidance_channels": None}
    for name, expected in plain.items():
        if fields[name] != expected:
            raise ValueError(
                f"unsupported {name}={fields[name]} of process=meanflow; expected {expected}: guidance is an"
                " input of the network"
            )
    low, high = fields["guidance_interval"]
    if isinstance(sampler, MeanFlowSampler) and not low <= 0.5 <= high:
        raise ValueError(
            f"unsupported guidance_interval={low:g},{high:g} of sampler=meanflow; expected an interval around"
            " 0.5, as in training"
        )
    return float(low), float(high)


def _guidance(fields: Mapping[str, Any], components: Components) -> Guidance | None:
    rule = make_rule(fields["guidance"], **fields["guidance_options"])
    guidance = Guidance(
        rule=rule,
        interval=tuple(fields["guidance_interval"]),
        rescale=float(fields["guidance_rescale"]),
        channels=fields["guidance_channels"],
    )
    guidance.check(components.diffusion)
    if isinstance(rule, Perturbed):
        params = nnx.to_pure_dict(nnx.split(components.abstract_model)[1])
        jax.eval_shape(lambda params: isolate_tokens(params, rule.blocks), params)  # checks the blocks
    without_null = rule.weak == "null" and not components.image_spec.num_classes
    learned = isinstance(components.diffusion, MeanFlow)
    if fields["guidance_scale"] == 1 or without_null or learned:
        return None
    if rule.weak == "null" and not components.has_trained_null_class:
        raise ValueError(
            f"unsupported guidance_scale={fields['guidance_scale']:g} of a model trained with"
            " training.label_dropout=0, which has no null class to guide away from; expected 1"
        )
    return guidance
