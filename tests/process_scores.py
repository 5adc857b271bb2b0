"""A process that scores images of a model, as a script; it may die in the middle."""

import json
import os
import sys
from pathlib import Path

import jax
from fake_features import fake_network

from dig_jax import Sampler
from dig_jax.evaluation import feature_scores, store
from dig_jax.evaluation.evaluate import score
from dig_jax.evaluation.generated import GeneratedImages
from dig_jax.parallel import initialize_distributed, local_mesh, output_folder
from dig_jax.testing import PlainComponents, tiny_settings


def main(folder: Path, fields: dict, parts: int, port: int, count: int, number: int) -> None:
    """Score with `count` processes; die after that many parts of the images, if it is not 0."""
    if count > 1:
        initialize_distributed(f"127.0.0.1:{port}", count, number, 120)
    feature_scores._network = fake_network
    if parts:
        die_after(parts)
    sampler = Sampler(PlainComponents(tiny_settings(**fields)), {}, step=7, mesh=local_mesh())
    with output_folder(folder) as mirrored:
        score(sampler, mirrored.folder, resume=folder)
    (folder / f"devices {number}").write_text(f"{jax.device_count()}")


def die_after(count: int) -> None:
    """Save features after every part, and exit without cleaning up when part `count` is asked for."""
    store._SAVE_EVERY = -1
    parts = GeneratedImages.parts

    def some(self, first, size, stop):
        for number, part in enumerate(parts(self, first, size, stop)):
            if number == count:
                os._exit(9)
            yield part

    GeneratedImages.parts = some


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), *map(int, sys.argv[3:]))
