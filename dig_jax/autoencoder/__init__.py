"""Stable Diffusion's KL autoencoder, from images to latents and back.

autoencoder = dig_jax.autoencoder.load("stabilityai/sd-vae-ft-ema")
latents = autoencoder.mean(autoencoder.encode(images))
images = to_uint8(autoencoder.decode(latents))
"""

from dig_jax.autoencoder.model import Autoencoder, to_uint8
from dig_jax.autoencoder.networks import AutoencoderArchitecture
from dig_jax.autoencoder.weights import load

__all__ = ["Autoencoder", "AutoencoderArchitecture", "load", "to_uint8"]
