"""Images decoded and cropped per second and core: our sources and pipeline compared to Pillow alone.

python benchmarks/images.py [--size=256] [--width=500] [--height=375] [--images=128] [--repeats=5]

It writes JPEGs of ImageNet's usual size to a directory and reads them. The figures are CPU time of all
threads, which a busy machine distorts little, and the best of the repeats. The last line compares the
wall-clock time of several threads and one.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from dig_jax.data import batches, load_source
from dig_jax.data.encoded import EncodedSource
from dig_jax.data.images import adm_crop

_BATCH = 16


def main() -> None:
    """Make the images and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in {"size": 256, "width": 500, "height": 375, "images": 128, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    options.images -= options.images % _BATCH
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "class"
        folder.mkdir()
        for seed in range(options.images):
            _image(options.width, options.height, seed).save(folder / f"{seed:05}.jpg", quality=90)
        source = load_source(
            "image_folder", "train", path=directory, image_size=options.size, heldout_fraction=0.0
        )
        _report(source, options)


def _report(source: EncodedSource, options: argparse.Namespace) -> None:
    paths = [source.images.root / file for file in source.images.files]
    contents = [path.read_bytes() for path in paths]

    def decode_alone() -> None:
        for content in contents:
            Image.open(io.BytesIO(content)).convert("RGB")

    def decode_and_crop() -> None:
        for path in paths:
            with Image.open(path) as image:
                adm_crop(image.convert("RGB"), options.size)

    def read() -> None:
        for index in range(len(source)):
            _ = source[index]

    def stream(threads: int) -> Callable[[], None]:
        def take() -> None:
            with closing(batches(source, batch_size=_BATCH, seed=0, flip=True, num_threads=threads)) as data:
                for _ in range(options.images // _BATCH):
                    next(data)

        return take

    cores = len(os.sched_getaffinity(0))
    rows = {
        "Pillow: decode": decode_alone,
        "Pillow: open, decode, ADM's crop": decode_and_crop,
        "source[index]": read,
        "batches, in one thread": stream(0),
        "headers, for data.buckets": source.native_sizes,
    }
    print(f"{options.images} JPEGs of {options.width}×{options.height} to {options.size} px, {cores} cores")
    speeds = {
        name: options.images / _best(run, time.process_time, options.repeats) for name, run in rows.items()
    }
    reference = speeds["Pillow: open, decode, ADM's crop"]
    print(f"{'':36}images/s/core   ratio")
    for name, speed in speeds.items():
        print(f"{name:36}{speed:13.0f}{speed / reference:8.2f}")
    one, many = (_best(stream(threads), time.perf_counter, options.repeats) for threads in (1, cores))
    print(f"{cores} threads instead of 1, wall clock: {one / many:.2f} × the images per second")


def _image(width: int, height: int, seed: int) -> Image.Image:
    """Make waves with some noise, which compress about as well as a photograph."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width][..., None] / 40
    phases, slopes = random.uniform(0, 6, (2, 3, 4)), random.uniform(-1, 1, (2, 3, 4))
    waves = sum(
        np.sin(slopes[0, :, i] * x + phases[0, :, i]) * np.cos(slopes[1, :, i] * y + phases[1, :, i])
        for i in range(4)
    )
    return Image.fromarray(
        np.uint8(np.clip(128 + 40 * waves + random.normal(0, 6, (height, width, 3)), 0, 255))
    )


def _best(run: Callable[[], None], clock: Callable[[], float], repeats: int) -> float:
    """Return the seconds of the fastest run, after one warm-up run."""
    times = []
    for _ in range(repeats + 1):
        began = clock()
        run()
        times.append(clock() - began)
    return min(times[1:])


if __name__ == "__main__":
    main()
