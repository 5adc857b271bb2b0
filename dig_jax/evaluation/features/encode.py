"""--mode=encode with `encode.features`: DINOv2's patch features of the training images, for iREPA."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Generator

import grain
import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.data import Source, open_source
from dig_jax.data.features import local_folder, new_features
from dig_jax.data.latents import LatentSource
from dig_jax.data.pipeline import read_options
from dig_jax.encoding.shard_writer import Unreadable, read_image
from dig_jax.errors import ConfigError, UserError, naming_setting
from dig_jax.evaluation.features.dinov2 import Dinov2, load_dinov2
from dig_jax.parallel import batch_sharding, local_mesh, replicated
from dig_jax.progress import Progress

log = logging.getLogger(__name__)

_Images = UInt8[np.ndarray, "n height width 3"]


def encode_features(settings: Config) -> None:
    """Write features of the training images, and of their mirror images, to `auxiliary.repa_features`.

    Models of latents align with features of the images in `config.encode`, without those that the latents
    skipped.

    Raises:
        UserError: invalid settings, missing weights, a folder that exists, or a full disk.
    """
    path, name = settings.auxiliary.repa_features, settings.encode.features
    assert name is not None
    if path is None:
        raise ConfigError("missing config.auxiliary.repa_features; expected a new folder for the features")
    if jax.process_count() > 1:
        raise ConfigError(f"unsupported config.encode.features={name} on {jax.process_count()} processes")
    with naming_setting("config.auxiliary.repa_features"):
        folder = local_folder(path)
    target = Components(settings).train_source
    try:
        network = load_dinov2(name, settings.encode.features_weights)
    except UserError as error:
        raise ConfigError(f"config.encode.features_weights: {error}") from error
    mirrored = settings.data.flip and target.flip
    about = {
        "network": network.name,
        "weights": network.weights_hash,
        "preprocessing": network.preprocessing,
        "images": target.fingerprint,
    }
    encode = _Encoder(network, settings.encode.batch_size)
    with (
        new_features(folder, len(target), mirrored, about) as append,
        Progress("image", first=0, total=len(target), every_seconds=30.0) as progress,
        contextlib.closing(_batches(settings, target, encode.batch_size)) as batches,
    ):
        done = 0
        for images in batches:
            both = (images, images[:, :, ::-1])[: 1 + mirrored]
            append(*[encode(one) for one in both])
            done += len(images)
            progress.show(done)
    log.info("features of %d images in %s", done, folder)


class _Encoder:
    """A network on all devices of this process."""

    def __init__(self, network: Dinov2, batch_size: int):
        mesh = local_mesh()
        self.batch_size, self._sharding = batch_size * mesh.size, batch_sharding(mesh)
        network = jax.device_put(network, replicated(mesh))
        self._features = functools.partial(jax.jit(Dinov2.patch_features), network)

    def __call__(self, images: _Images) -> Float[np.ndarray, "n rows columns d"]:
        """Return finite float16 features; the last batch is padded for the computation."""
        missing = self.batch_size - len(images)
        padded = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)], "edge")
        features: Array = self._features(jax.device_put(padded, self._sharding))
        with np.errstate(over="ignore"):
            stored = np.asarray(features)[: len(images)].astype(np.float16)
        if not np.isfinite(stored).all():
            raise UserError(
                "non-finite features in float16; check the weights in config.encode.features_weights"
            )
        return stored


def _batches(settings: Config, target: Source, size: int) -> Generator[_Images, None, None]:
    """Yield the images that belong to the training examples, in their order."""
    source, skips = target, isinstance(target, LatentSource)
    if skips:
        if settings.encode.name is None:
            raise ConfigError("missing config.encode.name; expected the source of the latents' images")
        source = open_source("config.encode", settings.encode.name, "train", settings.encode.options)
    # An image that is unreadable is not among the latents; other sources replace it.
    read = functools.partial(read_image, source) if skips else source.__getitem__
    examples = iter(grain.MapDataset.range(len(source)).map(read).to_iter_dataset(read_options(None, size)))
    with contextlib.closing(examples):
        images = (_rgb(one["image"]) for one in examples if not isinstance(one, Unreadable))
        while batch := list(itertools.islice(images, size)):
            yield np.stack(batch)


def _rgb(image: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    """Return an image of a source as RGB pixels."""
    if image.dtype != np.uint8:
        image = np.clip(np.rint((image + 1) * 127.5), 0, 255).astype(np.uint8)
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return image
