"""What happens around a command: the command line, the log, and errors as one line.

Exit status: 0 all is done; 1 a checkpoint, a disk or the like was not as it should be; 2 the command line or
the config cannot be; 130 interrupted (128 + SIGINT). A traceback is a bug of ours.
"""

import inspect
import logging
import re
import runpy
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from dig_jax.config import Config, check_field, from_dict, read_settings, to_dict
from dig_jax.data.class_names import class_index
from dig_jax.errors import ConfigError, UserError, naming_setting, one_line, suggest
from dig_jax.parallel import exit_process, is_peer_failure

log = logging.getLogger(__name__)

_ALL_AGAIN = "The same command, given to all of them again, goes on from the last checkpoint"


def run(main: Callable[[Config, Path], None], usage: str) -> None:
    """Calls `main` with the config of the command line; what the user can mend is told in one line.

    Args:
        main: (config, workdir that it has by default) → None; it may read absl's flags.
        usage: what --help shows above the list of flags.
    """
    _start_log()
    try:
        if any(argument.lstrip("-") in ("help", "h", "helpfull") for argument in sys.argv[1:]):
            sys.stdout.write(f"{usage}\n{flags.FLAGS.main_module_help()}\n")
            return
        main(*_parse(sys.argv))
    except ConfigError as error:
        _fail(one_line(error), 2)
    except (UserError, OSError) as error:
        _fail(one_line(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on", 130)
    except Exception as error:
        if is_peer_failure(error):
            _say(f"another process has ended ({one_line(error)}): see its log. {_ALL_AGAIN}")
            exit_process(1, wait=False)
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        exit_process(1)


def numbers(text: str | None, flag: str) -> np.ndarray | None:
    """ "0,3,5-7" as [0, 3, 5, 6, 7].

    Raises:
        ConfigError: the text is no such list, or one of more than a million numbers.
    """
    return None if text is None else _joined(list(map(_range, text.split(","))), text, flag)


def labels(text: str | None, class_names: Sequence[str]) -> np.ndarray | None:
    """ "0,5-7,golden retriever" as [0, 5, 6, 7, 207], by the classes' indices and names.

    What is written in digits is an index, also where classes are called by numbers: class names are sorted
    as text, so that of a hundred classes "1", "2", …, "100" index 2 is "100".

    Args:
        text: indices, ranges of them and names, with commas between them.
        class_names: of all classes, in order; see `class_index`.

    Raises:
        ConfigError: the text is no such list, or one of more than a million numbers.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    with naming_setting("--labels"):
        named = {part: class_index(part, class_names) for part in parts if re.search(r"[^\d-]", part)}
    return _joined([_range(str(named.get(part, part))) for part in parts], text, "labels")


def _range(part: str) -> range:
    """ "5-7" or "5"; empty, where it is neither."""
    bounds = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part)
    return range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1) if bounds else range(0)


def _joined(ranges: Sequence[range], text: str, flag: str) -> np.ndarray:
    """The numbers that a flag's text stands for."""
    if not all(ranges):
        raise ConfigError(f"--{flag}={text!r} is not a list of numbers and ranges such as 0,3,5-7")
    if sum(map(len, ranges)) > 10**6:
        raise ConfigError(f"--{flag}={text!r} is more than a million numbers")
    return np.concatenate(ranges)


def say_how_to_go_on() -> None:
    """Shows the command that resumes: the one that was given."""
    log.info("to go on: %s", shlex.join(["python", *sys.argv]))


def _start_log() -> None:
    """Our progress is wanted; what the libraries tell of themselves is not, unless it is a warning."""
    # On a terminal a message takes the place of the progress line, which is then written again.
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    logging.basicConfig(format=f"{clear}%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("dig_jax").setLevel(logging.INFO)
    # When a save fails Orbax raises, but also logs tracebacks, and leaves threads and tasks that fail
    # unheard: asyncio would log those when they are collected, after our line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    # Pillow's, of pictures that we refuse in a line of our own.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _parse(argv: list[str]) -> tuple[Config, Path]:
    """The config that --config and --config.FIELD stand for, and its workdir; other flags go to absl."""
    text, argv = _take_config_flag(argv)
    settings = _load(text)
    for argument in argv[1:]:
        if match := re.match(r"--?(?:no)?(config\.[\w.]+)", argument):
            _check_path(settings, match[1])
    try:
        # Not DEFINE_config_file: that loads by a method which Python has deprecated, and without our checks.
        holder = config_flags.DEFINE_config_dict("config", settings, sys_argv=argv, flag_values=flags.FLAGS)
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise ConfigError(str(error)) from error
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; flags start with --")
    path = Path(text.partition(":")[0])
    return from_dict(holder.value.to_dict()), path.parent if path.suffix == ".json" else Path(
        "runs", path.stem
    )


def _take_config_flag(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --config, written with "=" or as the next argument, and the other arguments."""
    for position, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            rest = argv[position + 1 :]
            if not equals and rest:
                value, *rest = rest
            if value:
                return value, argv[:position] + rest
    raise ConfigError("--config is missing; for example --config=configs/digits.py")


def _load(text: str) -> ConfigDict:
    """What get_config() returns in FILE.py or FILE.py:ARGUMENT,ARGUMENT, or what a run's config.json says."""
    name, _, argument = text.partition(":")
    if not Path(name).is_file():
        known = [str(other) for other in Path(name).parent.glob("*.py")] or ["configs/digits.py"]
        raise ConfigError(f"there is no config file {name!r}{suggest(name, known)}")
    if name.endswith(".json"):
        if argument:
            raise ConfigError(f"--config={text}: {name} takes no argument")
        return ConfigDict(to_dict(read_settings(Path(name))))
    try:
        get_config = runpy.run_path(name)["get_config"]
        if not argument:
            return get_config()
        if parameters := inspect.signature(get_config).parameters:
            return get_config(*argument.split(",", len(parameters) - 1))
    except Exception as error:  # whatever happens in the user's file
        raise ConfigError(f"--config={text}: {type(error).__name__}: {error}") from error
    raise ConfigError(f"--config={text}: {name} takes no argument")


def _check_path(settings: ConfigDict, path: str) -> None:
    """Raises unless a dotted path, such as config.model.name, leads to a field."""
    parent, value = "", settings
    for name in path.split("."):
        if parent:
            check_field(parent, name, list(value) if isinstance(value, ConfigDict) else [])
            value = value[name]
        parent = f"{parent}.{name}".lstrip(".")


def _fail(message: str, status: int) -> NoReturn:
    _say(message)
    exit_process(status)


def _say(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
