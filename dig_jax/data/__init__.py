"""Labelled images: sources with random access, and the batches drawn from them."""

from dig_jax.data.pipeline import batches, epoch, normalize
from dig_jax.data.sources import SPLITS, Source, load_source

__all__ = ["SPLITS", "Source", "batches", "epoch", "load_source", "normalize"]
