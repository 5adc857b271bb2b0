"""The flags of main.py, except --config (see `command_line`)."""

import functools

from absl import flags

from dig_jax.cli.commands import COMMANDS

# Flags that are texts without a default.
_TEXTS = {
    "workdir": (
        "Directory of the run; by default runs/NAME_OF_CONFIG. Modes that read a model also accept an"
        " exported file or folder, or hf://OWNER/NAME."
    ),
    "labels": (
        "With --mode=sample: classes, such as 0,5-7 or tabby,goldfish; by default all. A name of"
        ' digits or with a comma needs double quotes: --labels=\'"7","cat, tabby"\'.'
    ),
    "seeds": "With --mode=sample: seeds, such as 0-15; by default 0, 1, …",
    "output": (
        "What to write. With --mode=export: FILE.safetensors for the parameters, FILE.stablehlo or"
        " FILE.onnx for the sampler as a program, FOLDER or hf://OWNER/NAME for parameters with a model card."
        " With --mode=sample: FILE.npz, by default"
        " WORKDIR/generated.npz. With --mode=evaluate: a directory for the scores, by default the workdir."
    ),
    "license": "With --mode=export and a model card: its license, as the Hub names it.",
    "images": "With --mode=evaluate: a folder of images or FILE.npz to score instead of a model.",
    "topology": (
        "With --mode=plan: chips to plan for, which need not be present, such as v6e:8x8 or h100:8x4; by"
        " default this machine's devices."
    ),
    "profile_steps": "With --mode=train: steps to trace with JAX's profiler, such as 100-105.",
    "coordinator": (
        "With --mode=train, sample, evaluate or encode, and several processes: ADDRESS:PORT of process 0. Not"
        " needed on TPU pods or under SLURM."
    ),
}


def define_flags() -> flags.FlagValues:
    """Return new flags with their defaults: absl's global flags could not be defined twice in a notebook."""
    values = flags.FlagValues()
    for name, help in _TEXTS.items():
        flags.DEFINE_string(name, None, help, flag_values=values)
    flags.DEFINE_enum("mode", "train", list(COMMANDS), "The command to run.", flag_values=values)
    flags.DEFINE_multi_string(
        "sweep",
        None,
        "With --mode=evaluate: a sampling option and its values, such as guidance_scale=1,1.5,2 or"
        " guidance_interval=0:1,0.2:0.8. Repeat the flag for all combinations with another option.",
        flag_values=values,
    )
    flags.DEFINE_bool("json", False, "With --mode=plan: print JSON instead of text.", flag_values=values)
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    number("num_processes", None, "With --coordinator: number of processes.", lower_bound=1)
    number("process_id", None, "With --coordinator: index of this process, from 0.", lower_bound=0)
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "With --mode=demo: address to listen on; 0.0.0.0 lets other machines in.",
        flag_values=values,
    )
    number(
        "port",
        7860,
        "With --mode=demo: TCP port; 0 takes a free one.",
        lower_bound=0,
        upper_bound=65535,
    )
    number(
        "batch_size",
        8,
        "With --mode=demo: images that are drawn together; fewer take as long.",
        lower_bound=1,
        upper_bound=1024,
    )
    flags.DEFINE_float(
        "timeout",
        120,
        "With --mode=demo: seconds until a request is given up.",
        lower_bound=0.1,
        flag_values=values,
    )
    flags.DEFINE_float(
        "join_timeout",
        300,
        "Seconds to wait at the start until all processes are connected.",
        flag_values=values,
    )
    return values
