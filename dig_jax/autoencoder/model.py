"""The autoencoder: images to moments, moments to latents, latents to images."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, UInt8

from dig_jax.autoencoder.layers import Conv, largest_divisor
from dig_jax.autoencoder.networks import AutoencoderArchitecture, Decoder, Encoder
from dig_jax.autoencoder.stripes import decode_in_stripes

AnyArray = Array | np.ndarray
# Log variances of the posterior are clipped to this range, as in the code of latent diffusion.
_LOGVAR_RANGE = (-30.0, 20.0)
# Images of up to _MAX_WHOLE latent pixels are decoded at once by default, larger ones in stripes of _STRIPE.
_MAX_WHOLE, _STRIPE = 128 * 128, 512


class Autoencoder(nnx.Module):
    """Stable Diffusion's KL autoencoder (Rombach et al. 2022, appendix G).

    Images are float in -1…1 or uint8; latents are scaled by the config's `scaling_factor`. Both are NHWC.

    Args:
        config: sizes of the networks.
        dtype: dtype of activations and matrix products; parameters, norms and results are float32.
        rngs: random parameters; `load` reads trained ones.
    """

    def __init__(self, config: AutoencoderArchitecture, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, dtype=dtype, rngs=rngs)
        self.post_quant_conv = Conv(channels, channels, 1, dtype=dtype, rngs=rngs)

    def encode(
        self, images: Float[AnyArray, "n height width c"] | UInt8[AnyArray, "n height width c"]
    ) -> Float[Array, "n latent_height latent_width moments"]:
        """Return the posterior's unscaled moments: means, then log variances along the last axis.

        Raises:
            ValueError: a size that is not a multiple of `config.downsampling`, or a wrong number of channels.
        """
        _, height, width, channels = images.shape
        if height % self.config.downsampling or width % self.config.downsampling:
            raise ValueError(
                f"invalid images of {height}×{width} pixels; expected multiples of {self.config.downsampling}"
            )
        _check_channels("images", channels, self.config.in_channels)
        return encode_images(*nnx.split(self), jnp.asarray(images))

    def mean(self, moments: Float[AnyArray, "*batch moments"]) -> Float[Array, "*batch c"]:
        """Return the posterior's mean as latents."""
        mean, _ = jnp.split(jnp.asarray(moments, jnp.float32), 2, axis=-1)
        return mean * self.config.scaling_factor

    def sample(
        self, moments: Float[AnyArray, "n height width moments"], keys: Key[Array, " n"]
    ) -> Float[Array, "n height width c"]:
        """Sample latents from the posterior, with one of `keys` per image."""
        mean, logvar = jnp.split(jnp.asarray(moments, jnp.float32), 2, axis=-1)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        return (mean + jnp.exp(0.5 * logvar) * noise) * self.config.scaling_factor

    def decode(
        self, latents: Float[AnyArray, "n height width c"], *, stripes: int | None = None
    ) -> Float[Array, "n image_height image_width c_out"]:
        """Return float32 images in about -1…1; `to_uint8` converts them to pixels.

        Args:
            latents: scaled latents of any height and width.
            stripes: number of stripes to decode the image in, a divisor of the latents' height; more stripes
                need less memory and give the same result up to rounding. Default: 1 for latents of up to
                128×128, else stripes of about 512 latent pixels.

        Raises:
            ValueError: stripes that do not divide the height, or a wrong number of channels.
        """
        _, height, width, channels = latents.shape
        _check_channels("latents", channels, self.config.latent_channels)
        if stripes is None:
            stripes = default_stripes(height, width)
        if stripes < 1 or height % stripes:
            raise ValueError(f"invalid stripes={stripes}; expected a divisor of the latents' height {height}")
        return _decode(*nnx.split(self), jnp.asarray(latents), stripes)

    def on(self, sharding: jax.sharding.Sharding) -> "Autoencoder":
        """Return the autoencoder with its parameters on the devices of a sharding."""
        graphdef, params = nnx.split(self)
        return nnx.merge(graphdef, jax.device_put(params, sharding))

    def fingerprint(self) -> str:
        """Return the SHA-256 of sizes and parameters, in hexadecimal; latent caches store it."""
        sizes = [f"{name}={value!r}" for name, value in dataclasses.asdict(self.config).items()]
        # Existing caches depend on this text, which is the repr of the config under an earlier class name.
        digest = hashlib.sha256(f"Architecture({', '.join(sizes)})".encode())
        for path, variable in sorted(nnx.to_flat_state(nnx.state(self)), key=lambda item: str(item[0])):
            digest.update(repr(path).encode() + np.asarray(variable[...]).tobytes())
        return digest.hexdigest()


@functools.partial(jax.jit, static_argnums=0)
def encode_images(graphdef: nnx.GraphDef, params: Any, images: Array) -> Array:
    """Return the moments of images of a valid size, given a split `Autoencoder`."""
    model = nnx.merge(graphdef, params)
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 127.5 - 1
    mean, logvar = jnp.split(model.quant_conv(model.encoder(images)).astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([mean, jnp.clip(logvar, *_LOGVAR_RANGE)], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(graphdef: nnx.GraphDef, params: Any, latents: Array, stripes: int) -> Array:
    model = nnx.merge(graphdef, params)
    x = model.post_quant_conv(latents / model.config.scaling_factor)
    x = model.decoder(x) if stripes == 1 else decode_in_stripes(model.decoder, x, stripes)
    return x.astype(jnp.float32)


def default_stripes(height: int, width: int) -> int:
    """Return the default number of stripes for latents of this size."""
    if height * width <= _MAX_WHOLE:
        return 1
    return height // largest_divisor(height, _STRIPE // width)


def _check_channels(name: str, channels: int, expected: int) -> None:
    if channels != expected:
        raise ValueError(f"invalid {name} with {channels} channels; expected {expected} (NHWC)")


def to_uint8(images: Float[AnyArray, "*shape"], rule: str = "round") -> UInt8[Array, "*shape"]:
    """Convert decoded images to pixels: clip x/2 + 1/2 to 0…1, multiply by 255, and round or truncate.

    Args:
        images: values in about -1…1.
        rule: "round", or "truncate" as ADM does.
    """
    pixels = jnp.clip(images / 2 + 0.5, 0, 1) * 255
    return (jnp.round(pixels) if rule == "round" else jnp.floor(pixels)).astype(jnp.uint8)
