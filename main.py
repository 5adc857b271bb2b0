"""Trains a diffusion model, goes on where it stopped, and shows, samples and scores what it has learnt.

python main.py --config=configs/digits.py                     train in runs/digits, or go on there
python main.py --config=configs/digits.py --workdir=DIR       train in DIR
python main.py --config=configs/digits.py --mode=sample --labels=0,3,5-7 --seeds=0-3
python main.py --config=configs/digits.py --mode=evaluate     score again
python main.py --config=configs/digits.py --mode=export --output=digits.safetensors    parameters to share
python main.py --config=configs/dig_xl.py --mode=plan --topology=v5e:16x16    memory and time on such chips

--config=configs/dig_xl.py:512 gives the config an argument, --config=WORKDIR/config.json takes that of a run,
--config.FIELD=VALUE sets a field, such as --config.training.steps=4000; configs/base.py lists all fields.
"""

import functools
from pathlib import Path

from absl import flags

from dig_jax.cli import command_line as cli
from dig_jax.config import Config
from dig_jax.encoding.encode import encode
from dig_jax.errors import ConfigError
from dig_jax.evaluation.evaluate import evaluate
from dig_jax.export.export import export
from dig_jax.parallel import initialize_distributed
from dig_jax.planning import plan
from dig_jax.runtime import keep_compiled_programs, leave_stacks_without_names, prepare_cpu
from dig_jax.sampling.sample import sample
from dig_jax.training.telemetry.profiler import profiled_steps
from dig_jax.training.train import train

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/NAME_OF_CONFIG by default.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "sample", "evaluate", "encode", "export", "plan"], "What to do."
)
_LABELS = flags.DEFINE_string("labels", None, "With --mode=sample: classes, such as 0,5-7 or tabby,goldfish.")
_SEEDS = flags.DEFINE_string("seeds", None, "With --mode=sample: seeds, such as 0-15; 0, 1, … by default.")
_OUTPUT = flags.DEFINE_string("output", None, "With --mode=export: the file, FILE.safetensors.")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "With --mode=plan: chips that need not be there, such as v6e:8x8 or h100:8x4; else this machine.",
)
_JSON = flags.DEFINE_bool("json", False, "With --mode=plan: JSON instead of text.")
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "In training: steps to be traced by JAX's profiler, such as 100-105."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Of several processes that train, encode or sample: ADDRESS:PORT of the first; TPU pods, SLURM: no flag.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
_JOIN_TIMEOUT = flags.DEFINE_float("join_timeout", 300, "Seconds that processes wait for each other.")


def main(settings: Config, default_workdir: Path) -> None:
    """Calls the one function that the mode stands for."""
    workdir = Path(_WORKDIR.value or default_workdir)
    seeds = cli.numbers(_SEEDS.value, "seeds")
    if _MODE.value != "sample" and not (_LABELS.value is seeds is None):
        raise ConfigError("--labels and --seeds go with --mode=sample")
    if _MODE.value != "plan" and (_TOPOLOGY.value or _JSON.value):
        raise ConfigError("--topology and --json go with --mode=plan")
    if (_MODE.value == "export") != bool(_OUTPUT.value):
        raise ConfigError("--mode=export and --output=FILE.safetensors go together")
    profiled = profiled_steps(cli.numbers(_PROFILE_STEPS.value, "profile_steps"))
    if _MODE.value != "train" and profiled:
        raise ConfigError("--profile_steps goes with --mode=train")
    prepare_cpu(settings.mesh.cpu_devices)
    leave_stacks_without_names()
    if _MODE.value != "plan":  # whose chips are not there to run what would be kept
        keep_compiled_programs()
    if _MODE.value in ("train", "encode", "sample"):
        initialize_distributed(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _JOIN_TIMEOUT.value
        )
    if _MODE.value == "train":
        if train(settings, workdir, profiled) is None:
            cli.say_how_to_go_on()
    elif _MODE.value == "plan":
        plan.show(settings, _TOPOLOGY.value or plan.THIS, _JSON.value)
    elif _MODE.value == "sample":
        sample(settings, workdir, functools.partial(cli.labels, _LABELS.value), seeds)
    elif _MODE.value == "encode":
        encode(settings)
    elif _MODE.value == "export":
        export(settings, workdir, Path(_OUTPUT.value))
    else:
        evaluate(settings, workdir)


if __name__ == "__main__":
    cli.run(main, __doc__)
