"""Model families and gate settings on digits of 32 px, at equal training time and about equal size.

python benchmarks/families.py --seconds=100 --seeds=0,1 --write

First the CPU time of every family's train step is measured, in turns within one process. Then each trains
for as many steps as fit into the time. Patches have 4 × 4 pixels, so that a line of the 8 × 8 tokens has the
half-life 8: that is DiG at 256 px with the released half-life of 16. Half-lives of 4 and 2 are, in lines,
the released one at 512 and 1,024 px. Times are shifted toward noise by 4, because the digits are enlarged by
4. --names=dis@800,dig@800 trains for 800 steps each instead. --write adds the rows that are missing in
families.json.
"""

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks import digits, runs  # noqa: E402
from benchmarks.gpu_models import train_steps  # noqa: E402
from dig_jax import config  # noqa: E402
from dig_jax.components import param_count  # noqa: E402
from dig_jax.planning.planned_run import PlannedRun, lower_train_step  # noqa: E402
from dig_jax.planning.topology import THIS, find_topology  # noqa: E402

RECORD = pathlib.Path(__file__).with_suffix(".json")

_DIG = {"model.gate_normalizer": "8"}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "dig": _DIG,
    "dig-skips": {**_DIG, "model.skip": "linear"},
    "u-dig": {
        "model.name": "U-DiG-S/4",
        "model.gate_normalizer": "grid",
        "model.depth": 5,
        "model.hidden_size": 32,
        "model.num_heads": 1,
        "model.mlp_hidden_size": 96,
    },
    "dit": {"model.name": "DiT-S/4", "model.mlp_hidden_size": 384},
    "dis": {"model.name": "DiS-S/4", "model.depth": 6, "model.num_heads": 0, "model.mlp_hidden_size": 0},
    "hybrid": {**_DIG, "model.mixer": "gla*3+softmax"},
    "gate-4": {"model.gate_normalizer": "4"},
    "gate-2": {"model.gate_normalizer": "2"},
    "gate-spread": {"model.gate_normalizer": "spread"},
}
_ROUNDS = 7


def family_of(name: str) -> str:
    """Return the family of a run's name, FAMILY or FAMILY@STEPS."""
    return name.partition("@")[0]


def settings_of(family: str, seed: int, steps: int) -> config.Config:
    """Return the config of a family: flow matching without guidance."""
    common = {
        "model.name": "DiG-S/4",
        "model.mlp_hidden_size": 256,
        "data.options": {"image_size": 32},
        "data.batch_size": 16,
        "diffusion.time_shift": 4.0,
        "training.steps": steps,
        "logging.heldout_every_steps": 0,
        "sampling.guidance_scale": 1.0,
        "mesh.cpu_devices": 1,
    }
    return digits.settings_of("flow", seed, **{**common, **FAMILIES[family]})


def step_seconds(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the median CPU seconds of each family's train step, of runs in turns, and its parameters."""
    topology = find_topology(THIS)
    found = {name: PlannedRun.of(settings_of(name, 0, 100), topology) for name in names}
    steps = {name: train_steps(lower_train_step(run).compile(), run) for name, run in found.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(_ROUNDS + 1):
        for name, step in steps.items():
            began = time.process_time()
            step(3)
            if number:  # the first round also makes the state
                times[name].append((time.process_time() - began) / 3)
    return {
        name: {"seconds": statistics.median(times[name]), "parameters": param_count(run.state["params"])}
        for name, run in found.items()
    }


def rows_of(
    family: str, seed: int, steps: int, about: Mapping[str, Any], images: int, workdir: pathlib.Path
) -> Iterator[runs.Row]:
    """Train a family; yield the row of its samples."""
    ways = [{"sampler": "dpmpp_2m", "steps": 20}]
    for row in runs.train_and_score(settings_of(family, seed, steps), workdir, images, ways):
        yield {**about, **row}


def main() -> None:
    """Run the benchmark on the command line."""
    parser = runs.arguments(__doc__, RECORD, FAMILIES)
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU time of each run's train steps")
    parser.add_argument("--times", type=pathlib.Path, help="file that keeps the measured train steps")
    options = parser.parse_args()
    digits.prepare(1)
    names = options.names.split(",")
    if options.times and options.times.exists():
        measured = json.loads(options.times.read_text())
    else:
        measured = step_seconds(list(dict.fromkeys(family_of(name) for name in names)))
        if options.times:
            options.times.write_text(json.dumps(measured, indent=1) + "\n")
    steps = {
        name: int(given or options.seconds / measured[family]["seconds"] // 10 * 10)
        for name in names
        for family, _, given in [name.partition("@")]
    }
    print(json.dumps({"measured": measured, "training_steps": steps}), flush=True)
    runs.run_all(
        options,
        RECORD,
        lambda name, seed, workdir: rows_of(
            family_of(name), seed, steps[name], measured[family_of(name)], options.images, workdir
        ),
    )


if __name__ == "__main__":
    main()
