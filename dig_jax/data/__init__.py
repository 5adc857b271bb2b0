"""Image sources with random access, and the batches drawn from them."""

from dig_jax.data.pipeline import batches, epoch, normalize
from dig_jax.data.registry import load_source, open_source
from dig_jax.data.source import SPLITS, ImageSpec, Source

__all__ = ["SPLITS", "ImageSpec", "Source", "batches", "epoch", "load_source", "normalize", "open_source"]
