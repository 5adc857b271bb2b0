"""Classifier-free guidance: wraps a class-conditional denoiser as an unconditional one."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from dig_jax.diffusion.guidance.guidance import Guidance, Output, Pair
from dig_jax.diffusion.process import Denoiser, Images

LabeledDenoiser = Callable[[Images, Num[Array, " b"], Int[Array, " b"]], Float[Array, "b h w d"]]
"""(x, timesteps, labels) -> output."""


def classifier_free(
    denoise: LabeledDenoiser,
    labels: Int[Array, " b"],
    null_label: int,
    scale: ArrayLike,
    *,
    channels: int | None = None,
) -> Denoiser:
    """Guide the prediction by uncond + scale · (cond - uncond) (Ho & Salimans 2022, eq. 6).

    The scale follows the DiT convention, 1 + w of the paper: 1 is the plain conditional model. Both
    predictions come from one batch of twice the size. Output channels that are not guided, such as the
    variance, are the conditional ones.

    Args:
        denoise: (x [B, H, W, C], t [B], labels [B]) -> [B, H, W, C] or, with a variance, [B, H, W, 2C].
        labels: classes [B].
        null_label: the label of the unconditional model.
        scale: a number, traced or not, or one per image [B]; the Python number 1 skips the unconditional
            half.
        channels: number of leading channels to guide, in 1 … C; None guides all C. The released samplers of
            DiT and DiG guide 3 of 4.

    Raises:
        ValueError: scale has an invalid shape, or, when the denoiser is called, channels is not in 1 … C.
    """

    def plain(x: Images, t: Array) -> Output:
        return denoise(x, t, labels)

    if isinstance(scale, int | float) and scale == 1:
        return plain
    scale = jnp.asarray(scale)
    if scale.shape not in ((), labels.shape):
        raise ValueError(
            f"invalid shape of scale: got {scale.shape}; expected () or one value per label, {labels.shape}"
        )
    pair = null_pair(denoise, labels, null_label)
    denoiser = Guidance(channels=channels)(plain, pair, scale.reshape(-1, 1, 1, 1))
    assert callable(denoiser)  # the rule holds at all times and has no memory
    return denoiser


def null_pair(denoise: LabeledDenoiser, labels: Int[Array, " b"], null_label: int) -> Pair:
    """Return a function that evaluates the labels and the null label in one batch of twice the size."""

    def pair(x: Images, t: Array) -> tuple[Output, Output]:
        nulls = jnp.full_like(labels, null_label)
        output = denoise(_interleave(x, x), _interleave(t, t), _interleave(labels, nulls))
        cond, uncond = jnp.moveaxis(output.reshape(-1, 2, *output.shape[1:]), 1, 0)
        return cond, uncond

    return pair


def _interleave(a: Array, b: Array) -> Array:
    """Return a_0, b_0, a_1, b_1, …: unlike concatenation, each pair stays on the device that holds it."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
