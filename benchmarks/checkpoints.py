"""CPU time of saving, verifying and restoring checkpoints, with and without checksums.

python benchmarks/checkpoints.py --gigabytes=2.5 --repeats=4

Each repeat saves one checkpoint of random numbers with checksums and one without, verifies both and restores
both. The result is CPU seconds of this process, in all threads, per 10 GB.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from dig_jax.checkpoints.integrity import find_corruption
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.testing import tiny_settings


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    random, count = np.random.default_rng(0), int(options.gigabytes * 1e9 / 4 / 10)
    state = {"params": {str(n): random.standard_normal(count, np.float32) for n in range(10)}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    seconds: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for checksums in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                measure(Path(folder), state, abstract, checksums, seconds)
    for name, values in seconds.items():
        scaled = 10 / options.gigabytes * np.array(values)
        print(f"{name}: {np.median(scaled):.1f} s of CPU per 10 GB ({min(scaled):.1f} to {max(scaled):.1f})")


def measure(workdir, state, abstract, checksums, seconds) -> None:
    """Save, verify and restore one checkpoint, and note the CPU seconds of each."""
    settings = tiny_settings(checkpoint__checksums=checksums)
    kind = "with checksums" if checksums else "without"

    def timed(name, action) -> None:
        start = time.process_time()
        action()
        seconds.setdefault(f"{name} {kind}", []).append(time.process_time() - start)

    def save() -> None:
        with Checkpoints(workdir, settings.checkpoint) as checkpoints:
            checkpoints.save(1, state, {}, settings)

    def restore() -> None:
        with Checkpoints(workdir, settings.checkpoint) as checkpoints:
            checkpoints.restore(abstract)

    timed("save", save)
    timed("verify", lambda: find_corruption(workdir / "checkpoints" / "1"))
    timed("verify and restore", restore)


if __name__ == "__main__":
    main()
