"""Auxiliary losses on the digits at equal steps: accuracy and Fréchet distance, beside the plain loss.

python benchmarks/auxiliary.py --steps=2400 --seeds=0,1 --write

All rows train flow matching from the same initialization on the same batches and draw the same noise. The
internal head is also sampled with internal guidance, for which it exists. iREPA aligns with the pixels of
each token: an encoder that costs nothing, and the least that alignment can give. --write adds the rows that
are missing in auxiliary.json.
"""

import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import digits, runs  # noqa: E402
from dig_jax.components import Features  # noqa: E402
from dig_jax.models.embeddings import patchify  # noqa: E402

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


def rows_of(loss: str, seed: int, steps: int, images: int, workdir: pathlib.Path) -> Iterator[runs.Row]:
    """Train with a loss; yield one row per way to sample: classifier-free guidance, or internal guidance."""
    settings = digits.settings_of("flow", seed, **{"training.steps": steps, **LOSSES[loss]})
    ways = [{}, GUIDED] if loss == "internal" else [{}]
    return runs.train_and_score(settings, workdir, images, ways, features_of(loss))


def main() -> None:
    """Run the benchmark on the command line."""
    parser = runs.arguments(__doc__, RECORD, LOSSES)
    parser.add_argument("--steps", type=int, default=2400, help="training steps of each run")
    options = parser.parse_args()
    digits.prepare()
    runs.run_all(
        options,
        RECORD,
        lambda name, seed, workdir: rows_of(name, seed, options.steps, options.images, workdir),
    )


if __name__ == "__main__":
    main()
