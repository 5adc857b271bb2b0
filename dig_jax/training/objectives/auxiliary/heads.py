"""Small networks that only auxiliary losses use; their parameters are `params["auxiliary"]`.

Checkpoints of a run hold them. Samplers, exported files and `init_from` leave them out.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Num

from dig_jax.components import Components, Params, model_options
from dig_jax.diffusion import Process
from dig_jax.models.layers import Linear, xavier
from dig_jax.parallel import gather_params
from dig_jax.rngs import make_rngs

_FREQUENCIES = 128
_LEAST = 1e-4  # of α and σ, whose ratio has an infinite logarithm at the ends of a path


class AlignmentHead(nnx.Module):
    """Linear, SiLU, Linear: the student's head of self-representation alignment."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.hidden = Linear(width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Transform each token."""
        return self.out(jax.nn.silu(self.hidden(x)))


class Projector(nnx.Module):
    """A 3×3 convolution from tokens to features of an encoder (iREPA)."""

    def __init__(self, width: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = nnx.Conv(width, channels, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t f"]:
        """Convolve tokens in raster order on a grid of (rows, columns)."""
        y = self.conv(x.reshape(x.shape[0], *grid, -1))
        return y.reshape(*x.shape[:2], -1)


class LogVariance(nnx.Module):
    """u, the logarithm of the loss at a noise level: a linear map of Fourier features (EDM2).

    The loss ℓ/eᵘ + u has its minimum over u where eᵘ is the mean of ℓ at the level, so that all levels weigh
    the same. The features are √2 cos(2π (f ln(σ/α)/4 + φ)) with fixed random f ~ N(0, 1) and φ. u starts at
    zero, where the loss is ℓ.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.linear = Linear(_FREQUENCIES, 1, use_bias=False, kernel_init=zeros, rngs=rngs)

    def __call__(self, level: Float[Array, " b"]) -> Float[Array, " b"]:
        """Return u at noise levels ln(σ/α)."""
        random = np.random.default_rng(0)
        frequencies = jnp.float32(random.standard_normal(_FREQUENCIES))
        phases = jnp.float32(random.random(_FREQUENCIES))
        features = jnp.cos(2 * math.pi * (level[:, None] / 4 * frequencies + phases))
        return self.linear(math.sqrt(2) * features)[:, 0]


class Heads(nnx.Module):
    """The heads of the losses that a config asks for; the others are None."""

    def __init__(self, components: Components, *, rngs: nnx.Rngs):
        settings, (_, options) = components.config.auxiliary, model_options(components.config.model)
        dtype = options.dtype
        self.log_variance = LogVariance(rngs=rngs) if settings.log_variance else None
        repa, sra = settings.repa_weight, settings.sra_weight
        width = options.level_of(settings.sra_block).width
        self.sra = AlignmentHead(width, dtype=dtype, rngs=rngs) if sra else None
        width = options.level_of(settings.repa_block).width
        self.repa = Projector(width, features_shape(components)[-1], dtype=dtype, rngs=rngs) if repa else None


def features_shape(components: Components) -> tuple[int, ...]:
    """Return (tokens, channels) of the encoder's features of an image, or (rows, columns, channels)."""
    if components.stored_features is not None:
        return components.stored_features.shape
    assert components.features is not None
    image = jax.ShapeDtypeStruct((1, *components.image_spec.image_shape), jnp.float32)
    return jax.eval_shape(components.features, image).shape[1:]


def init_heads(components: Components, key: Key[Array, ""]) -> Params:
    """Return {"auxiliary": random parameters}, or {} if no loss has a head."""
    heads = nnx.to_pure_dict(nnx.split(Heads(components, rngs=make_rngs(key)))[1])
    return {"auxiliary": heads} if heads else {}


def bind_heads(components: Components, params: Params) -> Heads:
    """Return the heads with their parameters."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Heads(components, rngs=make_rngs(0))))
    return nnx.merge(graphdef, gather_params(params.get("auxiliary", {})))


def noise_level(process: Process, times: Num[Array, " b"]) -> Float[Array, " b"]:
    """Return ln(σ/α) at these times, with α and σ at least 1e-4."""
    one = jnp.ones((*times.shape, 1, 1, 1))
    alpha, sigma = (
        jnp.maximum(process.corrupt(image, noise, times)[:, 0, 0, 0], _LEAST)
        for image, noise in [(one, 0 * one), (0 * one, one)]
    )
    return jnp.log(sigma) - jnp.log(alpha)
