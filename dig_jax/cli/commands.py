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

from absl.flags import FlagValues

from dig_jax.config import Config
from dig_jax.errors import ConfigError, alternatives, naming_environment
from dig_jax.files.paths import Path, to_path

log = logging.getLogger(__name__)

_PROCESSES = ("coordinator", "num_processes", "process_id", "join_timeout")


@dataclasses.dataclass(frozen=True)
class Command:
    """The function of a mode, and the flags it accepts in addition to --config, --mode and --workdir."""

    run: Callable[[Config, Path, FlagValues], None]
    flags: tuple[str, ...] = ()


def run(values: FlagValues, settings: Config, default_workdir: Path) -> None:
    """Run the mode of the command line.

    Args:
        values: the flags.
        settings: the config.
        default_workdir: the workdir if --workdir is not given.

    Raises:
        ConfigError: a flag does not belong to the mode, or a flag or an environment variable is invalid.
    """
    mode = values.mode
    _check_flags(values, mode)
    with naming_environment():
        from dig_jax import runtime
    runtime.raise_lost_interrupts()
    runtime.set_numerics()
    runtime.prepare_cpu(settings.mesh.cpu_devices)
    runtime.disable_llvm_symbolizer()
    if mode != "plan":  # a cache would fill with programs for other chips, which are never loaded again
        runtime.enable_compilation_cache()
    command = COMMANDS[mode]
    if _PROCESSES[0] in command.flags:
        _join_processes(values)
    if values.topology is None:
        runtime.require_devices()
    command.run(settings, to_path(values.workdir or default_workdir), values)


def _check_flags(values: FlagValues, mode: str) -> None:
    for name in dict.fromkeys(name for command in COMMANDS.values() for name in command.flags):
        if values[name].present and name not in COMMANDS[mode].flags:
            modes = [other for other, command in COMMANDS.items() if name in command.flags]
            raise ConfigError(
                f"--{name} does not apply to --mode={mode}; expected --mode={alternatives(modes)}"
            )


def _join_processes(values: FlagValues) -> None:
    from dig_jax.parallel import initialize_distributed

    initialize_distributed(values.coordinator, values.num_processes, values.process_id, values.join_timeout)


def _train(settings: Config, workdir: Path, values: FlagValues) -> None:
    from dig_jax.cli.number_lists import numbers
    from dig_jax.training.telemetry.profiler import profiled_steps
    from dig_jax.training.train import train

    profiled = profiled_steps(numbers(values.profile_steps, "profile_steps"))
    if train(settings, workdir, profiled) is None:
        log.info("to resume: %s", shlex.join(["python", *sys.argv]))


def _sample(settings: Config, workdir: Path, values: FlagValues) -> None:
    from dig_jax.cli.number_lists import labels, numbers
    from dig_jax.sampling.sample import sample

    seeds = numbers(values.seeds, "seeds")
    output = to_path(values.output) if values.output else None
    sample(settings, workdir, functools.partial(labels, values.labels), seeds, output)


def _evaluate(settings: Config, workdir: Path, values: FlagValues) -> None:
    from dig_jax.evaluation.evaluate import evaluate, evaluate_images

    output = to_path(values.output) if values.output else None
    if values.images and values.sweep:
        raise ConfigError("--sweep does not apply to --images; expected a model in --workdir")
    if values.images:
        evaluate_images(settings, to_path(values.images), output or workdir)
    elif values.sweep:
        from dig_jax.evaluation.sweep import sweep

        sweep(settings, workdir, values.sweep, output)
    else:
        evaluate(settings, workdir, output)


def _encode(settings: Config, _: Path, values: FlagValues) -> None:
    if settings.encode.features is not None:
        from dig_jax.evaluation.features.encode import encode_features

        encode_features(settings)
        return
    from dig_jax.encoding.encode import encode

    encode(settings)


def _export(settings: Config, workdir: Path, values: FlagValues) -> None:
    if not values.output:
        raise ConfigError("missing --output; expected --output=FILE.safetensors, FILE.stablehlo or FILE.onnx")
    from dig_jax.export.export import export

    export(settings, workdir, to_path(values.output))


def _plan(settings: Config, _: Path, values: FlagValues) -> None:
    from dig_jax.planning import plan

    plan.show(settings, values.topology or plan.THIS, values.json, values.price)


def _demo(settings: Config, workdir: Path, values: FlagValues) -> None:
    from dig_jax.demo.demo import demo

    demo(
        settings,
        workdir,
        host=values.host,
        port=values.port,
        batch_size=values.batch_size,
        timeout=values.timeout,
    )


COMMANDS = {
    "train": Command(_train, ("profile_steps", *_PROCESSES)),
    "sample": Command(_sample, ("labels", "seeds", "output", *_PROCESSES)),
    "evaluate": Command(_evaluate, ("images", "sweep", "output", *_PROCESSES)),
    "encode": Command(_encode, _PROCESSES),
    "export": Command(_export, ("output",)),
    "demo": Command(_demo, ("host", "port", "batch_size", "timeout")),
    "plan": Command(_plan, ("topology", "json", "price")),
}
