"""The text of --help: an overview, or with --mode=MODE what one mode does, an example and its flags."""

import re
import shlex
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from absl.flags import FlagValues

from dig_jax.cli.commands import COMMANDS, PROCESSES, mode_of
from dig_jax.program import program

_MAX_WIDTH = 100
_COMMON = (
    ("--config=FILE", "configs/NAME.py, configs/NAME.py:ARGUMENT, or config.json of a run's workdir."),
    (
        "--workdir=DIR",
        "Directory of the run; by default runs/NAME, or the folder of config.json. Modes that read a model"
        " also accept an exported file or folder, or hf://OWNER/NAME.",
    ),
    (
        "--config.FIELD=VALUE",
        "Set a field, such as --config.training.steps=4000. docs/reference/config_reference.md lists all.",
    ),
)


def text(arguments: Sequence[str], values: FlagValues) -> str:
    """Return the help for a command line that asks for it.

    Args:
        arguments: the command line, without the program.
        values: the flags, for their descriptions.

    Raises:
        ConfigError: --mode is unknown.
    """
    mode = mode_of(arguments)
    return _overview() if mode is None else _about(mode, values)


def _overview() -> str:
    start = shlex.join(program())
    modes = []
    for mode, command in COMMANDS.items():
        flags = " ".join(f"--{name}" for name in command.flags if name not in PROCESSES)
        modes.append((mode, f"{command.summary}\n{flags}" if flags else command.summary))
    examples = (
        (f"{start} --config=configs/digits.py", "train on a CPU, in minutes"),
        (f"{start} --config=configs/digits.py --mode=sample --labels=7", "draw a seven"),
        (f"{start} --mode=doctor", "what this machine can run"),
    )
    return "\n".join(
        [
            f"usage: {start} --config=FILE [--mode=MODE] [FLAGS] [--config.FIELD=VALUE ...]",
            "",
            "Train diffusion models of images; draw, score, export and show what they generate.",
            "",
            f"Modes and their flags ({start} --mode=MODE --help explains one):",
            *_table(modes),
            "",
            "Flags of several processes, except under SLURM and on TPU pods:",
            f"  {' '.join(f'--{name}' for name in PROCESSES)}",
            "",
            "Flags of all modes:",
            *_table(_COMMON),
            "",
            "Examples:",
            *_table(examples),
        ]
    )


def _about(mode: str, values: FlagValues) -> str:
    command = COMMANDS[mode]
    start = shlex.join(program())
    flags = [(f"--{name}", _description(values, name, mode)) for name in command.flags]
    return "\n".join(
        [
            f"--mode={mode}: {command.summary}",
            "",
            *textwrap.wrap(command.about, _width()),
            "",
            *(f"  {start} {example}" for example in command.examples),
            "",
            "Flags:",
            *_table([*flags, *_COMMON]),
        ]
    )


def _description(values: FlagValues, name: str, mode: str) -> str:
    """Return what the help of a flag says of a mode, and its default."""
    flag = values[name]
    first, *rest = re.split(r"With --(mode=[^:]*|coordinator): ", flag.help)
    texts = [text for key, text in zip(rest[::2], rest[1::2], strict=True) if mode in re.findall(r"\w+", key)]
    sentences = [text[:1].upper() + text[1:] for text in (first, *(texts or rest[1::2]))]
    default = f" Default: {flag.default}." if flag.default not in (None, False) else ""
    return " ".join(" ".join(sentences).split()) + default


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _MAX_WIDTH)


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return lines with a column of names, and beside it texts, wrapped; names that are long have a line."""
    rows = list(rows)
    lengths = [len(name) for name, _ in rows]
    column = 4 + max((length for length in lengths if length <= 24), default=max(lengths))
    lines = []
    for name, text in rows:
        wrapped = [
            line
            for paragraph in text.splitlines()
            for line in textwrap.wrap(paragraph, max(_width() - column, 30), break_on_hyphens=False)
        ]
        if len(name) + 4 > column:
            lines += [f"  {name}", *(f"{'':{column}}{line}" for line in wrapped)]
        else:
            lines += [f"  {name:{column - 2}}{wrapped[0]}", *(f"{'':{column}}{line}" for line in wrapped[1:])]
    return lines
