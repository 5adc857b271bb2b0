"""Latent caches with given moments, written without an autoencoder."""

import numpy as np

from dig_jax.data.latents import FORMAT, INDEX_FILE, Shard, checksum, pack
from dig_jax.encoding.shard_writer import array_record_writer
from dig_jax.files.atomic import write_json
from dig_jax.files.paths import sha256

HEADER = {
    "format": FORMAT,
    "autoencoder": {
        "path": "sd",
        "fingerprint": "0123456789abcdef",
        "scaling_factor": 0.5,
        "dtype": "float32",
    },
    "pictures": {"name": "image_folder", "size": [32, 32], "crop": "adm", "upright": True},
    "class_names": ["cat", "dog", "eel"],
    "flip": True,
}


def random_moments(images, shape=(4, 4, 2), seed=0):
    """Return moments of images and their mirror images, [images, 2, height, width, 2·channels]."""
    *size, channels = shape
    return np.random.default_rng(seed).standard_normal((images, 2, *size, 2 * channels), np.float32)


def write_cache(directory, train, heldout=None, *, shard_size=4, **header):
    """Write a cache with labels 0, 1, 2, 0, …"""
    heldout = train[:0] if heldout is None else heldout
    *_, height, width, doubled = train.shape
    splits = {"train": train, "heldout": heldout}
    index = {
        **HEADER,
        "latents": {"shape": [height, width, doubled // 2], "dtype": train.dtype.name},
        "splits": {split: _write(directory, split, all_, shard_size) for split, all_ in splits.items()},
        **header,
    }
    write_index(directory, index)
    return directory


def write_index(directory, index):
    """Write an index with its checksum."""
    write_json(directory / INDEX_FILE, {**index, "sha256": checksum(index)})


def _write(directory, split, moments, shard_size):
    (directory / split).mkdir(parents=True)
    shards = []
    for first in range(0, len(moments), shard_size):
        file, chunk = f"{split}/{len(shards):05}.array_record", moments[first : first + shard_size]
        with array_record_writer(directory / file) as write:
            for number, both in enumerate(chunk, first):
                for one in both:
                    write(pack(number % 3, one))
        size, digest = (directory / file).stat().st_size, sha256(directory / file)
        shards.append(Shard(file, len(chunk), size, digest, (), (), ())._asdict())
    return shards
