"""The modes of main.py: the function that each runs, and the flags that only some of them accept.

Each function imports the packages that its mode needs, so that other modes, and errors in flags, do not wait
for them.
"""

import dataclasses
import functools
import logging
import shlex
import sys
from collections.abc import Callable

from absl import flags

from dig_jax.config import Config
from dig_jax.errors import ConfigError, alternatives
from dig_jax.files.paths import Path, to_path
from dig_jax.runtime import disable_llvm_symbolizer, enable_compilation_cache, prepare_cpu

log = logging.getLogger(__name__)

_PROCESSES = ("coordinator", "num_processes", "process_id", "join_timeout")


@dataclasses.dataclass(frozen=True)
class Command:
    """The function of a mode, and the flags it accepts in addition to --config, --mode and --workdir."""

    run: Callable[[Config, Path], None]
    flags: tuple[str, ...] = ()


def run(settings: Config, default_workdir: Path) -> None:
    """Run the mode of the command line.

    Raises:
        ConfigError: a flag does not belong to the mode, or its value is invalid.
    """
    mode = flags.FLAGS.mode
    _check_flags(mode)
    prepare_cpu(settings.mesh.cpu_devices)
    disable_llvm_symbolizer()
    if mode != "plan":  # a cache would fill with programs for other chips, which are never loaded again
        enable_compilation_cache()
    COMMANDS[mode].run(settings, to_path(flags.FLAGS.workdir or default_workdir))


def _check_flags(mode: str) -> None:
    for name in dict.fromkeys(name for command in COMMANDS.values() for name in command.flags):
        if flags.FLAGS[name].present and name not in COMMANDS[mode].flags:
            modes = [other for other, command in COMMANDS.items() if name in command.flags]
            raise ConfigError(
                f"--{name} does not apply to --mode={mode}; expected --mode={alternatives(modes)}"
            )


def _join_processes() -> None:
    from dig_jax.parallel import initialize_distributed

    values = flags.FLAGS
    initialize_distributed(values.coordinator, values.num_processes, values.process_id, values.join_timeout)


def _train(settings: Config, workdir: Path) -> None:
    from dig_jax.cli.number_lists import numbers
    from dig_jax.training.telemetry.profiler import profiled_steps
    from dig_jax.training.train import train

    profiled = profiled_steps(numbers(flags.FLAGS.profile_steps, "profile_steps"))
    _join_processes()
    if train(settings, workdir, profiled) is None:
        log.info("to resume: %s", shlex.join(["python", *sys.argv]))


def _sample(settings: Config, workdir: Path) -> None:
    from dig_jax.cli.number_lists import labels, numbers
    from dig_jax.sampling.sample import sample

    seeds = numbers(flags.FLAGS.seeds, "seeds")
    output = to_path(flags.FLAGS.output) if flags.FLAGS.output else None
    _join_processes()
    sample(settings, workdir, functools.partial(labels, flags.FLAGS.labels), seeds, output)


def _evaluate(settings: Config, workdir: Path) -> None:
    from dig_jax.evaluation.evaluate import evaluate

    evaluate(settings, workdir)


def _encode(settings: Config, _: Path) -> None:
    from dig_jax.encoding.encode import encode

    _join_processes()
    encode(settings)


def _export(settings: Config, workdir: Path) -> None:
    if not flags.FLAGS.output:
        raise ConfigError("missing --output; expected --output=FILE.safetensors")
    from dig_jax.export.export import export

    export(settings, workdir, to_path(flags.FLAGS.output))


def _plan(settings: Config, _: Path) -> None:
    from dig_jax.planning import plan

    plan.show(settings, flags.FLAGS.topology or plan.THIS, flags.FLAGS.json)


COMMANDS = {
    "train": Command(_train, ("profile_steps", *_PROCESSES)),
    "sample": Command(_sample, ("labels", "seeds", "output", *_PROCESSES)),
    "evaluate": Command(_evaluate),
    "encode": Command(_encode, _PROCESSES),
    "export": Command(_export, ("output",)),
    "plan": Command(_plan, ("topology", "json")),
}
