"""Feature caching on the digits: CPU seconds against the distance from uncached samples, beside fewer steps.

python main.py --config=configs/digits.py && python benchmarks/feature_cache.py --workdir=runs/digits --write

Every row draws the same seeds and labels. Its distance is the root mean square difference from the samples of
the same sampler without a cache; pixels are from -1 to 1. Rows with fewer steps show what the
time of a cached row buys otherwise. --write stores benchmarks/feature_cache.json.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import digits  # benchmarks/digits.py, which adds the repository to the path
import numpy as np

from dig_jax.sampling.sampler import Sampler, load

RECORD = pathlib.Path(__file__).with_suffix(".json")
CACHES = [(2, 0), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)]
FEWER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def rows(sampler: Sampler, name: str, steps: int, images: int, runs: int) -> list[dict[str, Any]]:
    """Return one row per way to draw the images; the runs of all ways alternate."""
    ways = [{"steps": steps}]
    ways += [{"steps": steps, "cache_interval": n, "cache_order": order} for n, order in CACHES]
    ways += [{"steps": round(share * steps)} for share in FEWER]
    seeds = np.arange(images)
    drawn = [sampler(seeds=seeds, sampler=name, return_latents=True, **way) for way in ways]  # compiles
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(runs):
        for way, measured in zip(ways, seconds, strict=True):
            began = time.process_time()
            sampler(seeds=seeds, sampler=name, return_latents=True, **way)
            measured.append(time.process_time() - began)
    return [
        {
            "sampler": name,
            **way,
            "cpu_seconds": round(float(np.median(measured)), 3),
            "distance": round(float(np.sqrt(np.mean((x - drawn[0]) ** 2))), 5),
            "runs": runs,
            "images": images,
        }
        for way, x, measured in zip(ways, drawn, seconds, strict=True)
    ]


def main() -> None:
    """Run the benchmark on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/digits", help="a run of configs/digits.py")
    parser.add_argument("--samplers", default="euler,dpmpp_2m")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"store {RECORD.name}")
    options = parser.parse_args()
    digits.prepare()
    record = []
    sampler = load(options.workdir)
    for name in options.samplers.split(","):
        for row in rows(sampler, name, options.steps, options.images, options.runs):
            print(json.dumps(row), flush=True)
            record.append(row)
    if options.write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
