"""Classifier-free guidance: wraps a class-conditional denoiser as an unconditional one."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from dig_jax.diffusion.process import Denoiser


def classifier_free(
    denoise: Callable[[Array, Array, Array], Array],
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
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: denoise(x, t, labels)
    scale = jnp.asarray(scale)
    if scale.shape not in ((), labels.shape):
        raise ValueError(
            f"invalid shape of scale: got {scale.shape}; expected () or one value per label, {labels.shape}"
        )

    def denoiser(x: Array, t: Array) -> Array:
        guided = x.shape[-1] if channels is None else channels
        if not 1 <= guided <= x.shape[-1]:
            raise ValueError(f"channels out of range: got {channels}; expected 1 … {x.shape[-1]} or None")
        nulls = jnp.full_like(labels, null_label)
        output = denoise(_interleave(x, x), _interleave(t, t), _interleave(labels, nulls))
        cond, uncond = jnp.moveaxis(output.reshape(-1, 2, *output.shape[1:]), 1, 0)
        weight = scale.astype(output.dtype).reshape(-1, 1, 1, 1)
        epsilon = uncond[..., :guided] + weight * (cond[..., :guided] - uncond[..., :guided])
        return jnp.concatenate([epsilon, cond[..., guided:]], axis=-1)

    return denoiser


def _interleave(a: Array, b: Array) -> Array:
    """Return a_0, b_0, a_1, b_1, …: unlike concatenation, each pair stays on the device that holds it."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
