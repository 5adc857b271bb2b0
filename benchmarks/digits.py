"""Objectives, samplers and steps on the digits, at equal training time: accuracy and Fréchet distance.

python benchmarks/digits.py --minutes=5 --seeds=0,1 --write

Each objective trains for as many steps as fit into the time at a speed that is measured first, so that only
then other work on the machine matters. --write adds the rows that are missing in benchmarks/digits.json.
"""

import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import runs  # noqa: E402
from configs import digits  # noqa: E402
from dig_jax import config, runtime  # noqa: E402
from dig_jax.files.paths import to_path  # noqa: E402
from dig_jax.training.train import train  # noqa: E402

RECORD = pathlib.Path(__file__).with_suffix(".json")

CLASSIFIER_FREE = {
    "model.internal_head": 0,
    "sampling.guidance_scale": 1.1,
    "sampling.internal_guidance_scale": 1.0,
}
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        **CLASSIFIER_FREE,
        "diffusion.process": "ddpm",
        "diffusion.schedule": "cosine",  # with linear betas, noise hides such small images at most steps
        "diffusion.times": "uniform",
        "model.learn_sigma": True,
    },
    "flow": CLASSIFIER_FREE,
    "modern": {},
}
DISCRETE = (("ddpm", 250), ("ddim", 50), ("ddim", 20), ("dpmpp_2m", 20), ("dpmpp_2m", 10), ("heun", 10))
CONTINUOUS = (("euler", 50), ("euler", 20), ("heun", 10), ("dpmpp_2m", 20), ("dpmpp_2m", 10))


def prepare(devices: int | None = None) -> None:
    """Set up JAX for the digits, on their config's number of CPU devices; call it before JAX computes."""
    runtime.set_numerics()
    runtime.prepare_cpu(devices or digits.get_config().mesh.cpu_devices)


def settings_of(objective: str, seed: int, **fields: Any) -> config.Config:
    """Return the config of the digits with an objective."""
    c = digits.get_config()
    c.seed = seed
    c.evaluation.num_images = 0
    c.sampling.every_steps = 0
    c.logging.tensorboard = False
    c.update_from_flattened_dict({**OBJECTIVES[objective], **fields})
    return config.from_dict(c.to_dict())


def training_steps(objective: str, minutes: float) -> int:
    """Return the number of steps that fit into the time on this machine, in a whole number of hundreds."""
    settings = settings_of(objective, 0, **{"training.steps": 300})
    with tempfile.TemporaryDirectory() as folder:
        train(settings, to_path(folder))
        rows = map(json.loads, (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines())
        speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return int(np.median(speeds) / settings.data.batch_size * minutes * 60) // 100 * 100


def rows_of(
    objective: str, seed: int, steps: int, workdir: pathlib.Path, num_images: int
) -> Iterator[runs.Row]:
    """Train an objective; yield one row per sampler."""
    settings = settings_of(objective, seed, **{"training.steps": steps})
    samplers = DISCRETE if settings.diffusion.process == "ddpm" else CONTINUOUS
    ways = [{"sampler": name, "steps": number} for name, number in samplers]
    return runs.train_and_score(settings, workdir, num_images, ways)


def main() -> None:
    """Run the benchmark on the command line."""
    parser = runs.arguments(__doc__, RECORD, OBJECTIVES)
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each run")
    parser.add_argument("--steps", type=int, help="training steps, instead of the time")
    options = parser.parse_args()
    prepare()
    steps = {
        name: options.steps or training_steps(name, options.minutes) for name in options.names.split(",")
    }
    print(json.dumps({"training_steps": steps}), flush=True)
    runs.run_all(
        options,
        RECORD,
        lambda name, seed, workdir: rows_of(name, seed, steps[name], workdir, options.images),
    )


if __name__ == "__main__":
    main()
