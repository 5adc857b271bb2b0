"""Auxiliary losses on the digits at equal steps: accuracy and Fréchet distance, beside the plain loss.

python benchmarks/auxiliary.py --steps=2400 --seeds=0,1 --write

All rows train flow matching from the same initialization on the same batches and draw the same noise. The
internal head is also sampled with internal guidance, for which it exists. iREPA aligns with the pixels of
each token: an encoder that costs nothing, and the least that alignment can give. --write stores
auxiliary.json.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import digits as objectives  # benchmarks/digits.py, which adds the repository to the path
import numpy as np

from dig_jax.components import Features
from dig_jax.evaluation.digits import score_digits
from dig_jax.files.paths import to_path
from dig_jax.models.embeddings import patchify
from dig_jax.sampling.sampler import load
from dig_jax.training.train import train

RECORD = pathlib.Path(__file__).with_suffix(".json")
PATCH = 2

LOSSES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "internal": {"model.internal_head": 1},
    "dispersive": {"auxiliary.dispersive_weight": 0.5, "auxiliary.dispersive_block": 1},
    "contrastive": {"auxiliary.contrastive_weight": 0.05},
    "sra": {"auxiliary.sra_weight": 0.5, "auxiliary.sra_block": 1, "auxiliary.sra_teacher_block": 2},
    "irepa": {"auxiliary.repa_weight": 0.5, "auxiliary.repa_block": 1},
}
GUIDED = {"internal_guidance_scale": 1.4, "guidance_scale": 1.0}


def features_of(loss: str) -> Features | None:
    """Return the encoder of a loss: the pixels of each token."""
    return (lambda images: patchify(images, PATCH)) if loss == "irepa" else None


def measured(
    loss: str, seed: int, steps: int, images: int, workdir: pathlib.Path
) -> Iterator[dict[str, Any]]:
    """Train with a loss; yield one row per way to sample."""
    settings = objectives.settings_of("flow", seed, **{"training.steps": steps, **LOSSES[loss]})
    train(settings, to_path(workdir), features=features_of(loss))
    sampler = load(workdir)
    labels, seeds = sampler.resolve(None, np.arange(images))
    ways: dict[str, Mapping[str, Any]] = {"classifier_free": {}}
    if loss == "internal":
        ways["internal"] = GUIDED
    for guidance, options in ways.items():
        scores = score_digits(sampler(labels, seeds=seeds, **options), labels)
        yield {
            "loss": loss,
            "guidance": guidance,
            "seed": seed,
            "training_steps": steps,
            "accuracy": scores["accuracy"],
            "frechet_distance": scores["frechet_distance"],
        }


def main() -> None:
    """Run the benchmark on the command line."""
    parser = objectives.arguments(__doc__, RECORD, LOSSES)
    parser.add_argument("--steps", type=int, default=2400, help="training steps of each run")
    options = parser.parse_args()
    objectives.prepare()
    objectives.measure_all(
        options,
        RECORD,
        lambda name, seed, workdir: measured(name, seed, options.steps, options.images, workdir),
    )


if __name__ == "__main__":
    main()
