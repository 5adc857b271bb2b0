"""Latent caches of given moments, written without an autoencoder."""

import numpy as np

from dig_jax.data.latents import FORMAT, INDEX, Shard, checksum, packed
from dig_jax.encoding.shard_writer import file_sha256, record_file
from dig_jax.files.atomic import write_json

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
    """Of images and their mirror images, [images, 2, height, width, 2·channels]."""
    *size, channels = shape
    return np.random.default_rng(seed).standard_normal((images, 2, *size, 2 * channels), np.float32)


def write_cache(directory, train, heldout=None, *, shard_size=4, **header):
    """Labels go round."""
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
    """With the checksum that it should have."""
    write_json(directory / INDEX, {**index, "sha256": checksum(index)})


def _write(directory, split, moments, shard_size):
    (directory / split).mkdir(parents=True)
    shards = []
    for first in range(0, len(moments), shard_size):
        file, part = f"{split}/{len(shards):05}.array_record", moments[first : first + shard_size]
        with record_file(directory / file) as write:
            for number, both in enumerate(part, first):
                for one in both:
                    write(packed(number % 3, one))
        size, sha256 = (directory / file).stat().st_size, file_sha256(directory / file)
        shards.append(Shard(file, len(part), size, sha256, (), (), ())._asdict())
    return shards
