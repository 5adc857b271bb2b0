"""The auxiliary losses as functions of arrays; each returns one value per image or per group of images.

[D] is Wang & He 2025 (Diffuse and Disperse), [C] is Stoica et al. 2025 (contrastive flow matching), [S] is
SRA (self-representation alignment), [R] is REPA (Yu et al. 2025) and [I] its variant iREPA, [L] is LiT (Wang
et al. 2025).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dig_jax.diffusion import FlowMatching

_BETA = 0.05  # of the smooth L1 loss [S]
_EPSILON = 1e-6


def dispersive(tokens: Float[Array, "b t d"], *, group: int, temperature: float) -> Float[Array, " groups"]:
    """Return log mean_ij exp(-|z_i - z_j|² / (n τ)) of each group of consecutive images [D].

    z is all n = t·d activations of an image, and i = j counts. The loss is at most 0 and least if the images
    are far apart. A group is a number of images, so the value does not depend on the number of devices.

    Args:
        tokens: activations after one block.
        group: number of images that are compared with each other; it divides b.
        temperature: τ.
    """
    z = tokens.astype(jnp.float32).reshape(-1, group, tokens[0].size)
    z = z - z.mean(1, keepdims=True)  # distances stay, and lose less to rounding
    products = jnp.einsum("gin,gjn->gij", z, z, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.diagonal(products, axis1=1, axis2=2)
    distances = jnp.maximum(norms[:, :, None] + norms[:, None, :] - 2 * products, 0) / z.shape[-1]
    return jax.nn.logsumexp(-distances / temperature, axis=(1, 2)) - 2 * jnp.log(group)


def contrastive(
    process: FlowMatching,
    output: Float[Array, "b h w d"],
    *,
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    times: Float[Array, " b"],
) -> Float[Array, " b"]:
    """Return -|prediction_i - target_j|², averaged over pixels, for another image j = i - 1 [C].

    The target of image j is computed at the time of image i, and has the weight of the main loss there.
    Together with the main loss and the factor λ < 1, the prediction that minimizes an image's loss is
    (target_i - λ target_j)/(1 - λ).
    """
    others = process.targets(jnp.roll(x0, 1, axis=0), jnp.roll(noise, 1, axis=0), times)
    error = output[..., : x0.shape[-1]] - others
    return -process.weight_at(times) * jnp.mean(error**2, axis=(1, 2, 3))


def smooth_l1(student: Float[Array, "b t d"], teacher: Float[Array, "b t d"]) -> Float[Array, " b"]:
    """Return the smooth L1 distance, averaged over tokens and channels; no gradient flows to the teacher [S].

    An error e counts e²/(2β) below β = 0.05, and |e| - β/2 above.
    """
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    error = jnp.abs(student.astype(jnp.float32) - teacher)
    return jnp.where(error < _BETA, error**2 / (2 * _BETA), error - _BETA / 2).mean((1, 2))


def distillation(
    student: Float[Array, "b h w c_student"], teacher: Float[Array, "b h w c_teacher"], *, channels: int
) -> Float[Array, " b"]:
    """Return the mean squared error of the prediction, and of the variance if both models learn one [L].

    No gradient flows to the teacher.

    Args:
        student: the model's output.
        teacher: another model's output.
        channels: channels of the image; the first ones are the prediction, the others the variance.
    """
    count = min(student.shape[-1], teacher.shape[-1])
    error = student[..., :count] - jax.lax.stop_gradient(teacher[..., :count])
    parts = (error[..., :channels], error[..., channels:])
    return sum((jnp.mean(part**2, axis=(1, 2, 3)) for part in parts if part.size), jnp.zeros(len(student)))


def at_grid(features: Float[Array, "b rows columns d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
    """Resize features to the model's grid by linear interpolation, with anti-aliasing; return its tokens."""
    n, *found, d = features.shape
    features = features.astype(jnp.float32)
    if tuple(found) != grid:
        features = jax.image.resize(features, (n, *grid, d), "linear")
    return features.reshape(n, -1, d)


def representation(projected: Float[Array, "b t d"], features: Float[Array, "b t d"]) -> Float[Array, " b"]:
    """Return 1 - cosine over the channels of each token, averaged over tokens [R].

    The features are first normalized over the tokens of an image, (z - mean)/(deviation + 1e-6) for each
    channel, which keeps their spatial structure [I]. No gradient flows to them.
    """
    z = jax.lax.stop_gradient(features.astype(jnp.float32))
    z = (z - z.mean(1, keepdims=True)) / (z.std(1, keepdims=True) + _EPSILON)
    return 1 - (_unit(projected.astype(jnp.float32)) * _unit(z)).sum(-1).mean(1)


def _unit(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Divide each token by its norm; a token of zeros stays zero and has a finite gradient."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + _EPSILON**2)
