"""Trains a diffusion model, goes on where it stopped, and shows, samples and scores what it has learnt.

python main.py --config=configs/digits.py                     train in runs/digits, or go on there
python main.py --config=configs/digits.py --workdir=DIR       train in DIR
python main.py --config=configs/digits.py --mode=sample --labels=0,3,5-7 --seeds=0-3
python main.py --config=configs/digits.py --mode=evaluate     score again

--config=configs/dig_xl.py:512 gives the config an argument, --config.FIELD=VALUE sets a field, such as
--config.training.steps=4000; configs/base.py lists all fields.
"""

from pathlib import Path

from absl import flags

from dig_jax import cli, report
from dig_jax.config import Config
from dig_jax.errors import ConfigError
from dig_jax.parallel import prepare_cpu
from dig_jax.training.loop import train

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/NAME_OF_CONFIG by default.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "evaluate"], "What to do.")
_LABELS = flags.DEFINE_string("labels", None, "With --mode=sample: classes, such as 0,3,5-7; one of each.")
_SEEDS = flags.DEFINE_string("seeds", None, "With --mode=sample: seeds, such as 0-15; 0, 1, … by default.")


def main(settings: Config, name: str) -> None:
    """Calls the one function that the mode stands for."""
    workdir = Path(_WORKDIR.value or f"runs/{name}")
    labels, seeds = cli.numbers(_LABELS.value, "labels"), cli.numbers(_SEEDS.value, "seeds")
    if _MODE.value != "sample" and not (labels is seeds is None):
        raise ConfigError("--labels and --seeds go with --mode=sample")
    prepare_cpu(settings.mesh.cpu_devices)
    if _MODE.value == "train":
        train(settings, workdir)
    elif _MODE.value == "sample":
        report.sample(settings, workdir, labels, seeds)
    else:
        report.evaluate(settings, workdir)


if __name__ == "__main__":
    cli.run(main, __doc__)
