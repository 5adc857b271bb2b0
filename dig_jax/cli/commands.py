"""The modes of main.py: the function that each runs, the flags that only some of them accept, and their help.

Each function imports the packages that its mode needs, so that other modes, and errors in flags, do not wait
for them.
"""

import dataclasses
import functools
import logging
import os
import re
import shlex
from collections.abc import Callable, Sequence

from absl.flags import FlagValues

from dig_jax.config import Config
from dig_jax.errors import ConfigError, alternatives, naming_environment, suggest
from dig_jax.files.paths import Path, to_path
from dig_jax.program import restart

log = logging.getLogger(__name__)

PROCESSES = ("coordinator", "num_processes", "process_id", "join_timeout")


@dataclasses.dataclass(frozen=True)
class Command:
    """A mode.

    Attributes:
        run: its function.
        flags: the flags that it accepts in addition to --config, --mode and --workdir.
        reads_model: its workdir may also be a model of the Hugging Face Hub, hf://OWNER/NAME.
        summary: what it does, in a line.
        about: what a user has to know before the first use.
        examples: command lines, without the program.
    """

    run: Callable[[Config, Path, FlagValues], None]
    flags: tuple[str, ...] = ()
    reads_model: bool = False
    summary: str = ""
    about: str = ""
    examples: tuple[str, ...] = ()


def mode_of(arguments: Sequence[str]) -> str | None:
    """Return the mode that a command line names, as --mode=MODE or --mode MODE, before its flags are parsed.

    Raises:
        ConfigError: unknown mode.
    """
    modes = re.findall(r"(?:^| )--?mode[= ](\S+)", " ".join(arguments))
    for mode in modes:
        if mode not in COMMANDS:
            expected = alternatives(list(COMMANDS))
            raise ConfigError(f"invalid --mode={mode!r}; expected {expected}{suggest(mode, COMMANDS)}")
    return modes[-1] if modes else None


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
    row = COMMANDS[mode]
    if PROCESSES[0] in row.flags:
        _join_processes(values)
    if values.topology is None and mode != "doctor":  # which reports what is wrong with them
        runtime.require_devices()
    row.run(settings, _workdir(values.workdir or default_workdir, row), values)


def _workdir(text: str | os.PathLike, command: Command) -> Path:
    if not command.reads_model:
        return to_path(text)
    from dig_jax.checkpoints.reader import model_path

    return model_path(text)


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
        log.info("to resume: %s", shlex.join(restart()))


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
        evaluate_images(settings, to_path(values.images), workdir, output)
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
        raise ConfigError(
            "missing --output; expected --output=FILE.safetensors, FILE.stablehlo, FILE.onnx, FOLDER or"
            " hf://OWNER/NAME"
        )
    from dig_jax.export.export import export, push
    from dig_jax.files.hub import PREFIX

    if values.output.startswith(PREFIX):
        push(settings, workdir, values.output, values.license)
    else:
        export(settings, workdir, to_path(values.output), values.license)


def _plan(settings: Config, _: Path, values: FlagValues) -> None:
    from dig_jax.planning import plan

    plan.show(settings, values.topology or plan.THIS, values.json)


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


def _doctor(settings: Config, workdir: Path, _: FlagValues) -> None:
    from dig_jax.doctor.doctor import doctor

    doctor(settings, workdir)


_DIGITS = "--config=configs/digits.py"
_XL = "--config=configs/dig_xl.py"
COMMANDS = {
    "train": Command(
        _train,
        ("profile_steps", *PROCESSES),
        summary="Train a model, or resume where the run ended. The default.",
        about="The workdir gets checkpoints, metrics, samples, scores and report.html. The same command"
        " resumes a run that was killed. SIGTERM and Ctrl-C save first.",
        examples=(_DIGITS, f"{_DIGITS} --workdir=runs/short --config.training.steps=500"),
    ),
    "sample": Command(
        _sample,
        ("labels", "seeds", "output", *PROCESSES),
        reads_model=True,
        summary="Draw any number of images into one npz file.",
        about="One image per seed. Without --labels, seed s has class s modulo the number of classes. The"
        " same command resumes a set that was interrupted. --workdir may be a file of --mode=export or hf://OWNER/NAME.",
        examples=(
            f"{_DIGITS} --mode=sample --labels=0,3,5-7 --seeds=0-3",
            f"{_XL} --mode=sample --seeds=0-49999",
        ),
    ),
    "evaluate": Command(
        _evaluate,
        ("images", "sweep", "output", *PROCESSES),
        reads_model=True,
        summary="Score a model, a folder or an npz file: FID and others.",
        about="The scores go to scores.json, with everything that they depend on. config.evaluation names the"
        " scores and the reference.",
        examples=(
            f"{_DIGITS} --mode=evaluate --config.sampling.steps=10",
            f"{_DIGITS} --mode=evaluate --sweep=steps=5,10,20 --sweep=sampler=ddim,heun",
        ),
    ),
    "encode": Command(
        _encode,
        PROCESSES,
        summary="Write latents of images, to train on.",
        about="config.encode names the images, config.autoencoder the autoencoder. The same command resumes.",
        examples=(f"{_XL} --mode=encode --config.encode.options.path=/data/imagenet/train",),
    ),
    "export": Command(
        _export,
        ("output", "license"),
        reads_model=True,
        summary="Write a file of parameters, the sampler as a program, or a folder with a model card.",
        about="dig_jax.load, --workdir and config.init_from read FILE.safetensors. FILE.stablehlo draws with"
        " JAX alone, FILE.onnx with ONNX Runtime. hf://OWNER/NAME uploads to the Hugging Face Hub. See"
        " docs/guide/export.md.",
        examples=(
            f"{_DIGITS} --mode=export --output=digits.safetensors",
            f"{_DIGITS} --mode=export --output=digits_model --license=apache-2.0",
            f"{_DIGITS} --mode=export --output=digits.stablehlo",
        ),
    ),
    "demo": Command(
        _demo,
        ("host", "port", "batch_size", "timeout"),
        reads_model=True,
        summary="Serve a page and a JSON API that draw images, until Ctrl-C.",
        about="It needs the extra demo. There are no passwords: other machines reach it only with --host. See"
        " docs/guide/demo.md.",
        examples=(f"{_DIGITS} --mode=demo", f"{_DIGITS} --mode=demo --host=0.0.0.0 --port=80"),
    ),
    "plan": Command(
        _plan,
        ("topology", "json"),
        summary="Report memory, time and price on chips that you may not have.",
        about="It compiles the train step for the chips, which takes seconds to minutes. It needs the extra"
        " compilers for chips that are not present. See docs/guide/plan.md.",
        examples=(f"{_XL} --mode=plan --topology=v6e:8x8", f"{_XL}:512 --mode=plan --topology=h100:8x4"),
    ),
    "doctor": Command(
        _doctor,
        (),
        summary="Report what this machine can run: devices, kernels, packages, cache, disk, network.",
        about="With --config, for the model and the data of the config. The exit status is 1 if there is a"
        " problem.",
        examples=("--mode=doctor", f"{_XL} --mode=doctor"),
    ),
}
