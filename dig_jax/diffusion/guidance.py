"""Classifier-free guidance as a wrapper that turns a labelled denoiser into an unlabelled one."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from dig_jax.diffusion.gaussian import Denoiser


def classifier_free(
    denoise: Callable[[Array, Array, Array], Array],
    labels: Int[Array, " b"],
    null_label: int,
    scale: ArrayLike,
    *,
    channels: int | None = None,
) -> Denoiser:
    """Guide the noise prediction by uncond + scale · (cond - uncond) (Ho & Salimans 2022, eq. 6).

    The scale is that of the DiT family, the paper's 1 + w: 1 is the plain conditional model. Both predictions
    come from one batch of twice the size; what is not guided, as the variance, is the conditional one's.

    Args:
        denoise: (x [B, H, W, C], t [B], labels [B]) -> [B, H, W, C] or, with a variance, [B, H, W, 2C].
        labels: classes [B].
        null_label: the class that stands for none.
        scale: a number, traced or not, or one per image [B]; the Python number 1 skips the second half.
        channels: guide only the first so many of the C noise channels; None guides all. The released samplers
            of DiT and DiG guide 3 of 4.

    Raises:
        ValueError: scale has another shape, or, once x is seen, channels is not in 1 … C.
    """
    if isinstance(scale, int | float) and scale == 1:
        return lambda x, t: denoise(x, t, labels)
    scale = jnp.asarray(scale)
    if scale.shape not in ((), labels.shape):
        raise ValueError(f"scale must be a number or one per label {labels.shape}, got shape {scale.shape}")

    def denoiser(x, t):
        guided = x.shape[-1] if channels is None else channels
        if not 1 <= guided <= x.shape[-1]:
            raise ValueError(f"channels must be in 1 … {x.shape[-1]} or None, got {channels}")
        nulls = jnp.full_like(labels, null_label)
        output = denoise(_interleave(x, x), _interleave(t, t), _interleave(labels, nulls))
        cond, uncond = jnp.moveaxis(output.reshape(-1, 2, *output.shape[1:]), 1, 0)
        weight = scale.astype(output.dtype).reshape(-1, 1, 1, 1)
        epsilon = uncond[..., :guided] + weight * (cond[..., :guided] - uncond[..., :guided])
        return jnp.concatenate([epsilon, cond[..., guided:]], axis=-1)

    return denoiser


def _interleave(a: Array, b: Array) -> Array:
    """a_0, b_0, a_1, b_1, …: unlike concatenation it keeps both on the device that holds image 0, 1, …"""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
