"""Benchmarks that train once per name and seed: the command line, the record, and scores of the samples."""

import argparse
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dig_jax.components import Features
from dig_jax.config import Config
from dig_jax.evaluation.digits import score_digits
from dig_jax.files.atomic import write_json
from dig_jax.files.paths import to_path
from dig_jax.progress import duration
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.sampling.sampler import load
from dig_jax.training.train import train

Row = dict[str, Any]


def arguments(doc: str, record: pathlib.Path, names: Iterable[str]) -> argparse.ArgumentParser:
    """Return the arguments that these benchmarks share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--names", default=",".join(names), help="what to train")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--folder", help="keeps the runs; finished ones are not trained again")
    parser.add_argument(
        "--write", action="store_true", help=f"add the rows that are missing in {record.name}"
    )
    return parser


def run_all(
    options: argparse.Namespace,
    record: pathlib.Path,
    rows_of: Callable[[str, int, pathlib.Path], Iterable[Row]],
) -> None:
    """Print the rows of all names and seeds; with --write, store each as soon as it is there.

    Args:
        options: values of `arguments`.
        record: JSON file. With --write, a name and seed that it has are not measured again.
        rows_of: takes a name, a seed and a workdir.
    """
    rows = json.loads(record.read_text()) if options.write and record.exists() else []
    done = {(row["name"], row["seed"]) for row in rows}
    pairs = itertools.product(map(int, options.seeds.split(",")), options.names.split(","))
    missing = [(name, seed) for seed, name in pairs if (name, seed) not in done]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, seed) in enumerate(missing, start=1):
            workdir = pathlib.Path(options.folder or temporary) / f"{name}-{seed}"
            for row in rows_of(name, seed, workdir):
                rows.append({"name": name, "seed": seed, **row})
                print(json.dumps(rows[-1]), flush=True)
            if options.write:
                write_json(record, rows)
            left = (time.monotonic() - began) / number * (len(missing) - number)
            print(f"{number}/{len(missing)} runs, ETA {duration(left)}", flush=True)


def train_and_score(
    settings: Config,
    workdir: pathlib.Path,
    num_images: int,
    ways: Iterable[Mapping[str, Any]],
    features: Features | None = None,
) -> Iterator[Row]:
    """Train on digits, or go on with a run; yield one row for each way to sample, the sampler's options."""
    began = time.process_time()
    train(settings, to_path(workdir), features=features)
    seconds = time.process_time() - began
    sampler = load(workdir)
    labels, seeds = sampler.resolve(None, np.arange(num_images))
    for options in ways:
        scores = score_digits(sampler(labels, seeds=seeds, **options), labels)
        yield {
            "training_steps": settings.training.steps,
            "training_cpu_seconds": round(seconds, 1),
            **options,
            "evaluations": GenerationSpec.of(sampler.components, **options).evaluations,
            "accuracy": scores["accuracy"],
            "frechet_distance": scores["frechet_distance"],
        }
