"""Images from a trained model. An image is a function of its seed and label, not of the batch around it."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from dig_jax.autoencoder import Autoencoder, to_uint8
from dig_jax.checkpoints.reader import read_model
from dig_jax.components import Components, Params
from dig_jax.config import Config, check_same
from dig_jax.data.class_names import class_index
from dig_jax.parallel import (
    batch_sharding,
    batch_shards,
    distribute,
    local_mesh,
    replicated,
    sampling_mesh,
    state_sharding,
)
from dig_jax.sampling.generate import GenerationSpec, generate

Numbers = int | Sequence[int] | np.ndarray | None
Labels = Numbers | str | Sequence[str]

# Latent pixels that each device decodes at once: 4 images of 256 pixels, or one of 512. It takes about a
# gigabyte, beside what training keeps on the device.
_DECODED = 64 * 64


class Sampler:
    """Draws images from parameters; what a call leaves open is as the config's `sampling` says.

    Attributes:
        components: model, diffusion and data.
        params: what it draws with.
        step: how many steps the parameters were trained for.
    """

    def __init__(self, components: Components, params: Params, *, step: int, mesh: Mesh | None = None):
        self.components, self.params, self.step, self._mesh = components, params, step, None
        if mesh is not None:
            self._mesh = sampling_mesh(mesh)
            self.params = jax.device_put(params, state_sharding(params, self._mesh))

    def __call__(
        self,
        labels: Labels = None,
        *,
        seeds: Numbers = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        return_latents: bool = False,
    ) -> UInt8[np.ndarray, "n height width c"] | Float[np.ndarray, "n height width c"]:
        """Draws one image per seed.

        Args:
            labels: a class for each image, or one for all, by its number or its name; by default the image of
                seed s gets s mod classes.
            seeds: non-negative, one for each image; by default 0, 1, … for as many as there are labels.
            sampler: "ddim" or "ddpm".
            steps: of the sampler.
            guidance_scale: 1 is none; the noise is null + scale·(class - null) (Ho & Salimans 2022).
            size: height and width in pixels, or one number for both; by default the training images'.
            return_latents: give the model's own space as float32 instead of pixels.

        Raises:
            ValueError: labels, seeds, sampler, steps or size that cannot be.
            UserError: the autoencoder cannot be read.
        """
        x = self._draw(labels, seeds, sampler, steps, guidance_scale, size, trajectory=False)
        return x if return_latents else self._pictures(x)

    def trajectory(
        self,
        labels: Labels = None,
        *,
        seeds: Numbers = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> UInt8[np.ndarray, "steps n height width c"]:
        """What the model takes the finished image for, at each step; arguments as in a call."""
        x = self._draw(labels, seeds, sampler, steps, guidance_scale, None, trajectory=True)
        return self._pictures(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], *self.picture_shape)

    @property
    def picture_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the pictures that are drawn by default."""
        height, width, channels = self.components.image_spec.image_shape
        decoder = self.components.autoencoder
        if decoder is None:
            return height, width, channels
        factor = decoder.config.downsampling
        return factor * height, factor * width, decoder.config.out_channels

    def resolve(self, labels: Labels, seeds: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """The labels and seeds, int32 [N] each, that a call with these arguments uses.

        Raises:
            ValueError: an unknown class, a label or seed out of range, or different numbers of them.
        """
        images = self.components.image_spec
        classes = max(images.num_classes, 1)
        if labels is not None:
            labels = _numbers(labels, images.class_names)
            labels = _checked("label", labels, classes)
        if seeds is None:
            seeds = np.arange(1 if labels is None else len(labels))
        seeds = _checked("seed", seeds, 2**31)
        if labels is None:
            labels = seeds % classes
        if len(labels) != len(seeds) and 1 not in (len(labels), len(seeds)):
            raise ValueError(f"{len(labels)} labels and {len(seeds)} seeds: give as many, or one for all")
        labels, seeds = np.broadcast_arrays(labels, seeds)
        return labels.astype(np.int32), seeds.astype(np.int32)

    def _draw(self, labels, seeds, sampler, steps, guidance_scale, size, *, trajectory: bool) -> np.ndarray:
        settings, images = self.components.config.sampling, self.components.image_spec
        labels, seeds = self.resolve(labels, seeds)
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        height, width, channels = images.image_shape
        if size is not None:
            height, width = self._size_of(size)
        spec = GenerationSpec.of(
            self.components,
            shape=(height, width, channels),
            sampler=sampler,
            steps=steps,
            guided=scale != 1,
            trajectory=trajectory,
        )
        draw = functools.partial(generate, self.params, scale=jnp.float32(scale), spec=spec)
        batch_size = self._batch_size(len(seeds))
        parts = []
        for first in range(0, len(seeds), batch_size):
            numbers = np.minimum(np.arange(first, first + batch_size), len(seeds) - 1)
            batch = {"labels": labels[numbers], "seeds": seeds[numbers]}
            with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
                x = draw(**(distribute(batch, self._mesh) if self._mesh else batch))
            parts.append(np.asarray(x))
        return np.concatenate(parts, axis=-4)[..., : len(seeds), :, :, :]

    def _size_of(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """Height and width of what the model draws, for pictures of this size in pixels."""
        factor = decoder.config.downsampling if (decoder := self.components.autoencoder) else 1
        patch = factor * self.components.abstract_model.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1 or height % patch or width % patch:
            raise ValueError(f"size={size} must be positive and a multiple of {patch} pixels, a token's side")
        return height // factor, width // factor

    def _pictures(self, x: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n height width channels"]:
        return to_pixels(x) if self.components.autoencoder is None else _decoded(self._decoder, x)

    @functools.cached_property
    def _decoder(self) -> Autoencoder:
        """The autoencoder, on all devices of this process."""
        return self.components.autoencoder.on(replicated(local_mesh()))

    def _batch_size(self, count: int) -> int:
        """The config's, or what suffices where that is less, rounded up to what the mesh divides."""
        parts = batch_shards(self._mesh) if self._mesh else 1
        return -(-min(count, self.components.config.sampling.batch_size) // parts) * parts


def load(
    path: str | Path,
    ema: str | None = None,
    *,
    autoencoder: str | Path | None = None,
    settings: Config | None = None,
    mesh: Mesh | None = None,
) -> Sampler:
    """A sampler of a training run.

    Args:
        path: a workdir, of which the newest readable checkpoint is taken, one checkpoint in it, or what
            --mode=export wrote.
        ema: the decay of the average to sample from, such as "0.9999", or "params" for none; by default what
            the config says.
        autoencoder: what decodes latents, a folder, a file or a name on the Hub; by default the config's.
        settings: replaces the changeable settings of the checkpoint, such as `sampling`.
        mesh: devices to draw on; None: one.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
        ConfigError: settings that may not change differ.
    """
    if ema is None and settings is not None:
        ema = settings.sampled_ema
    stored, step, params = read_model(Path(path), ema)
    if settings is None:
        settings = stored.config
    else:
        check_same(stored.config, settings, path)
    if autoencoder is not None:
        decoder = dataclasses.replace(settings.autoencoder, path=str(autoencoder))
        settings = dataclasses.replace(settings, autoencoder=decoder)
    return Sampler(stored.with_config(settings), params, step=step, mesh=mesh)


def _numbers(labels: Labels, class_names: Sequence[str]) -> Numbers:
    """Labels of which none is a name."""
    if isinstance(labels, str):
        return class_index(labels, class_names)
    if isinstance(labels, Sequence):
        return [class_index(label, class_names) if isinstance(label, str) else label for label in labels]
    return labels


def _decoded(autoencoder: Autoencoder, latents: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n H W C"]:
    """Pictures, decoded by all devices of this process, some at a time."""
    count, height, width, _ = latents.shape
    devices = jax.local_device_count()
    size = devices * min(max(_DECODED // (height * width), 1), -(-count // devices))
    pictures = []
    for first in range(0, count, size):
        numbers = np.minimum(np.arange(first, first + size), count - 1)  # filled up: one shape is compiled
        part = jax.device_put(latents[numbers], batch_sharding(local_mesh()))
        pictures.append(np.asarray(to_uint8(autoencoder.decode(part))))
    return np.concatenate(pictures)[:count]


def _checked(name: str, numbers: Numbers, limit: int) -> Int[np.ndarray, " n"]:
    """One or more integers below a limit."""
    numbers = np.atleast_1d(np.asarray(numbers))
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or not len(numbers):
        raise ValueError(f"{name}s must be one or more integers, got {numbers.tolist()}")
    wrong = numbers[(numbers < 0) | (numbers >= limit)]
    if wrong.size:
        raise ValueError(f"{name} {wrong[0]} is out of range: there are 0…{limit - 1}")
    return numbers


def to_pixels(x: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """-1…1 as 0…255, clipped."""
    return np.clip(np.round((x + 1) * 127.5), 0, 255).astype(np.uint8)
