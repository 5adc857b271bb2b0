"""Cached latents read per second, compared to the peak of a TPU v5e chip: is the input a bottleneck?

python benchmarks/latents.py [--images=4096] [--batches=64] [--repeats=3]

It writes caches of random numbers and reads them as training does on two cores: in random order, in batches
of 256, with flips and samples. It prints images per second of wall-clock time and of CPU time, since busy
machines distort the former. The upper bound for a v5e is DiG-XL/2's FLOPs in bfloat16 at the chip's peak,
from benchmarks/plan_table.json.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from dig_jax.data import batches, load_source
from dig_jax.data.latents import FORMAT, INDEX_FILE, Shard, checksum, pack
from dig_jax.data.source import Source
from dig_jax.encoding.shard_writer import array_record_writer
from dig_jax.files.atomic import write_json
from dig_jax.files.paths import sha256
from dig_jax.runtime import prepare_cpu

_BATCH, _SHARD, _CORES = 256, 1024, 2
_PLANS, _PLAN = Path(__file__).with_name("plan_table.json"), "v5e:16x16"


def main() -> None:
    """Write the caches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in {"images": 4096, "batches": 64, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    prepare_cpu(1)  # like main.py
    print(f"{'':28}  wall clock  CPU time  v5e at most  ratios")
    for name, side in {"dig_xl:256,ours": 32, "dig_xl:512,ours": 64}.items():
        plan = json.loads(_PLANS.read_text())[f"{name} {_PLAN}"]
        most = plan["chip"]["flops"]["bfloat16"] / plan["model_flops_per_image"]
        for dtype in ("float32", "float16"):
            with tempfile.TemporaryDirectory() as directory:
                _write(Path(directory), options.images, side, dtype)
                source = load_source("latents", "train", path=directory)
                wall, cpu = _speed(source, options.batches, options.repeats)
            row = f"{name}, {side}×{side}×8 {dtype}"
            ratios = f"{wall / most:.0f} {cpu / most:.0f}"
            print(f"{row:28}  {wall:10.0f}  {cpu:8.0f}  {most:11.1f}  {ratios}", flush=True)


def _write(directory: Path, images: int, side: int, dtype: str) -> None:
    """Write a cache of random numbers."""
    random, shards = np.random.default_rng(0), []
    (directory / "train").mkdir()
    for number, first in enumerate(range(0, images, _SHARD)):
        count, file = min(_SHARD, images - first), f"train/{number:05}.array_record"
        with array_record_writer(directory / file) as write:
            for entry in range(2 * count):
                moments = random.standard_normal((side, side, 8), np.float32).astype(dtype)
                write(pack(entry % 1000, moments))
        size = (directory / file).stat().st_size
        shards.append(Shard(file, count, size, sha256(directory / file), (), (), ())._asdict())
    index = {
        "format": FORMAT,
        "autoencoder": {"path": "", "fingerprint": "", "scaling_factor": 0.18215},
        "pictures": {"size": [8 * side, 8 * side], "crop": "adm", "upright": False},
        "latents": {"shape": [side, side, 4], "dtype": dtype},
        "class_names": [str(label) for label in range(1000)],
        "flip": True,
        "splits": {"train": shards},
    }
    write_json(directory / INDEX_FILE, {**index, "sha256": checksum(index)})


def _speed(source: Source, count: int, repeats: int) -> tuple[float, float]:
    """Return the best images per second of wall-clock and of CPU time, after one warm-up run."""
    walls, cpus = [], []
    for _ in range(repeats + 1):
        with closing(batches(source, batch_size=_BATCH, seed=0, flip=True)) as data:
            next(data)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                next(data)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    images = count * _BATCH
    return images / min(walls[1:]), images / min(cpus[1:])


if __name__ == "__main__":
    main()
