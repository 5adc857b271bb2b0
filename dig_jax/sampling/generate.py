"""One jitted function from parameters, labels and seeds to images."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dig_jax.components import ModelSpec, Params
from dig_jax.diffusion import MeanFlow
from dig_jax.diffusion.guidance import LabeledDenoiser, Perturbed, null_pair
from dig_jax.diffusion.mean_flow import Jumps
from dig_jax.diffusion.piecewise import AnyDenoiser
from dig_jax.diffusion.process import Denoiser
from dig_jax.diffusion.samplers import Dopri5
from dig_jax.models.isolation import isolate_tokens
from dig_jax.parallel import constrain
from dig_jax.sampling.feature_cache import CachedModel, with_caches
from dig_jax.sampling.generation_spec import GenerationSpec

Predictor = Callable[[Array, Array, Array], tuple[Array, Array | None]]
"""(x, t, y) -> (prediction, prediction of the internal head or None)."""


@functools.partial(jax.jit, static_argnames="spec")
def generate(
    params: Params,
    *,
    labels: Int[Array, " b"],
    seeds: Int[Array, " b"],
    scale: Float[Array, ""] | Float[Array, "b 1 1 1"],
    spec: GenerationSpec,
    weak_params: Params | None = None,
) -> tuple[Float[Array, "*images"], Int[Array, " b"]]:
    """Return images in the model's space, and how often networks were evaluated for each of them.

    The images are [B, H, W, C], or [steps, B, H, W, C] for a trajectory.

    Args:
        params: parameters of the model.
        labels: class of each image.
        seeds: seed of each image.
        scale: scale of guidance, for all images or for each one.
        spec: everything static.
        weak_params: parameters of `spec.weak`.
    """

    def numbered(number: Int[Array, ""]) -> Float[Array, "b h w c"]:
        return noise(seeds, number, spec.shape)

    return generate_from(numbered, params, labels=labels, scale=scale, spec=spec, weak_params=weak_params)


def generate_from(
    noise: Callable[[Int[Array, ""]], Float[Array, "b h w c"]],
    params: Params,
    *,
    labels: Int[Array, " b"],
    scale: Float[Array, ""] | Float[Array, "b 1 1 1"],
    spec: GenerationSpec,
    weak_params: Params | None = None,
) -> tuple[Float[Array, "*images"], Int[Array, " b"]]:
    """Return what `generate` does, from standard normal noise by number: 0 is the start, i + 1 for step i."""
    denoiser = _denoiser(params, labels, scale, spec, weak_params)
    start = noise(jnp.int32(0))

    def step_noise(step: Int[Array, ""]) -> Float[Array, "b h w c"]:
        return noise(step + 1)

    evaluations = jnp.full(labels.shape, spec.evaluations or 0, jnp.int32)
    if isinstance(spec.sampler, Dopri5):
        images, counted = spec.sampler.solve(spec.process, denoiser, start)
        kinds = spec.kinds(np.array([span.middle for span in counted]))
        for kind, span in zip(kinds, counted, strict=True):
            evaluations += int(kind) * span.evaluations
    elif spec.trajectory:
        _, images = spec.sampler(spec.process, denoiser, start, step_noise, return_trajectory=True)
    else:
        images = spec.sampler(spec.process, denoiser, start, step_noise)
    # Replicated, so that every process can read all images.
    return constrain(images), constrain(evaluations)


def _denoiser(
    params: Params,
    labels: Int[Array, " b"],
    scale: Float[Array, ""] | Float[Array, "b 1 1 1"],
    spec: GenerationSpec,
    weak_params: Params | None,
) -> AnyDenoiser:
    """Return the denoiser that a spec describes."""
    caches: list[CachedModel] = []
    if spec.learned is not None:
        return _flow_map(spec, params, labels, scale)
    with_internal = spec.internal_scale != 1
    denoise = _internally_guided(_predictor(spec, spec.model, params, with_internal, caches), spec)

    def plain(x: Array, t: Array) -> Array:
        return denoise(x, t, labels)

    if spec.guidance is None:
        return with_caches(plain, caches)
    rule = spec.guidance.rule
    if rule.weak == "null":
        pair = null_pair(denoise, labels, spec.model.num_classes)
        return with_caches(spec.guidance(plain, pair, scale, spec.process), caches)
    if isinstance(rule, Perturbed):
        weak = dataclasses.replace(spec.model, isolated=not rule.blocks)
        weak_params = isolate_tokens(params, rule.blocks)
    else:
        weak = spec.weak
    assert weak is not None and weak_params is not None
    weak_predict = _predictor(spec, weak, weak_params, False, caches)

    def both(x: Array, t: Array) -> tuple[Array, Array]:
        return plain(x, t), weak_predict(x, t, labels)[0]

    return with_caches(spec.guidance(plain, both, scale, spec.process), caches)


def _flow_map(
    spec: GenerationSpec,
    params: Params,
    labels: Int[Array, " b"],
    scale: Float[Array, ""] | Float[Array, "b 1 1 1"],
) -> Denoiser:
    """Return a flow map as a function of timesteps [b], for steps of length 0, or with lengths [b, 2]."""
    assert spec.learned is not None and isinstance(spec.process, MeanFlow)
    time_range = spec.process.time_range
    strength = jnp.broadcast_to(1 - 1 / jnp.reshape(scale, -1), labels.shape) * spec.guided
    low, high = (jnp.full(labels.shape, end) for end in spec.learned)

    def denoise(x: Array, t: Array) -> Array:
        is_step = t.ndim == 2
        t, lengths = (t[:, 0], t[:, 1]) if is_step else (t, jnp.zeros(labels.shape))
        jumps = Jumps(t / time_range, lengths, strength, low, high)
        inputs = jumps.inputs if is_step else jumps.here.inputs
        return spec.model.denoise(params, x, t, labels, jump=inputs)

    return denoise


def _predictor(
    spec: GenerationSpec, model: ModelSpec, params: Params, with_internal: bool, caches: list[CachedModel]
) -> Predictor:
    """Return a network; one with a feature cache is appended to `caches`."""
    if spec.cache is not None:
        caches.append(CachedModel(functools.partial(model.outputs, params), spec.cache))
        return caches[-1]

    def predict(x: Array, t: Array, y: Array) -> tuple[Array, Array | None]:
        if not with_internal:
            return model.denoise(params, x, t, y), None
        outputs = model.outputs(params, x, t, y)
        return outputs.output, outputs.internal

    return predict


def _internally_guided(predict: Predictor, spec: GenerationSpec) -> LabeledDenoiser:
    """Return the model, guided away from the prediction of its internal head.

    internal + scale · (output - internal), in the channels of the image (Zhou et al. 2025): autoguidance
    whose weaker model is the first part of the same network, at no cost.
    """

    def denoise(x: Array, t: Array, y: Array) -> Array:
        output, internal = predict(x, t, y)
        if spec.internal_scale == 1:
            return output
        assert internal is not None
        channels = x.shape[-1]
        strong, weak = output[..., :channels], internal[..., :channels]
        guided = weak + spec.internal_scale * (strong - weak)
        return jnp.concatenate([guided, output[..., channels:]], axis=-1)

    return denoise


def noise(
    seeds: Int[Array, " b"], number: Int[Array, ""], shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Return standard normal noise from each image's seed; number 0 is the start, i + 1 is for step i."""
    key = jax.random.key(0)

    def draw(seed: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, seed), number), shape)

    return jax.vmap(draw)(seeds)
