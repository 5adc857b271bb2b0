"""The command line: from arguments to a config, and from errors to one line and an exit status.

Exit statuses: 0 success; 1 an error outside the program, such as a corrupt checkpoint or a full disk;
2 invalid flags or config; 130 interrupted (128 + SIGINT); 141 nobody reads standard
output any more (128 + SIGPIPE). A traceback is a bug in this program.
"""

import ast
import contextlib
import inspect
import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from dig_jax.cli.commands import COMMANDS, mode_of
from dig_jax.cli.logging_setup import start_logging
from dig_jax.config import Config, check_field, from_dict, read_settings, to_dict
from dig_jax.errors import ConfigError, StalledRead, UserError, naming_environment, one_line, suggest
from dig_jax.files.paths import Path, children, is_storage_error, local_copy, to_path
from dig_jax.streams import ending_with_reader, prepare_streams

_OUT_OF_MEMORY = (
    "out of device memory; reduce config.data.batch_size or config.sampling.batch_size, or set"
    " config.model.remat=full, config.training.accumulation or config.mesh.fsdp;"
    " docs/guide/plan.md shows what fits"
)


def run(
    main: Callable[[Config, Path], None],
    usage: Callable[[Sequence[str], flags.FlagValues], str],
    values: flags.FlagValues | None = None,
) -> None:
    """Call `main` with the config of the command line; print errors that the user can fix as one line.

    Args:
        main: function of the config and the default workdir.
        usage: returns the text of --help, from the arguments and the flags.
        values: the other flags, which are parsed in place; by default none.
    """
    prepare_streams()
    values = values or flags.FlagValues()
    start_logging()
    try:
        with ending_with_reader():
            if any(argument.lstrip("-") in ("help", "h", "helpfull") for argument in sys.argv[1:]):
                sys.stdout.write(f"{usage(sys.argv[1:], values)}\n")
            else:
                main(*_parse(sys.argv, values))
    except ConfigError as error:
        _fail(one_line(error), 2)
    except StalledRead as error:
        _end_at_once(one_line(error), 1)
    except (UserError, OSError) as error:
        _fail(one_line(error), 1)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to resume"
        if _is_distributed():
            _fail(message, 130)
        _end_at_once(message, 130)
    except Exception as error:
        if is_storage_error(error):
            _fail(f"cannot use object storage: {one_line(error, name_type=True)}", 1)
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(f"{_OUT_OF_MEMORY} ({one_line(error)})", 1)
        if not _is_distributed():
            raise
        from dig_jax.parallel import is_peer_failure

        if is_peer_failure(error):
            reason = f"another process failed ({one_line(error)}); see its log"
            _fail(f"{reason}. To resume, run the same command on all processes again", 1, wait=False)
        traceback.print_exc()
        _exit(1)


def _fail(message: str, status: int, *, wait: bool = True) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    _exit(status, wait=wait)


def _end_at_once(message: str, status: int) -> NoReturn:
    """Print an error and end the process without cleaning up.

    Python would wait for threads, of which one may hang in a read. A computation that still runs in another
    thread would crash when Python takes its modules away.
    """
    sys.stderr.write(f"error: {message}\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed
            stream.flush()
    os._exit(status)


def _is_distributed() -> bool:
    jax: Any = sys.modules.get("jax")  # errors in flags do not wait for its import
    return hasattr(jax, "distributed") and jax.distributed.is_initialized()


def _exit(status: int, *, wait: bool = True) -> NoReturn:
    if _is_distributed():
        from dig_jax.parallel import exit_process

        exit_process(status, wait=wait)
    sys.exit(status)


def _parse(argv: list[str], values: flags.FlagValues) -> tuple[Config, Path]:
    """Return the config that --config and --config.FIELD describe, and its default workdir.

    absl parses the other flags.
    """
    if mode_of(argv[1:]) == "doctor" and not any(re.match(r"--?config(=|$)", word) for word in argv):
        text, settings = "default", ConfigDict(to_dict(Config()))
    else:
        text, argv = _take_config_flag(argv)
        settings = load_config(text)
    argv = _take_options(argv, settings)
    for argument in argv[1:]:
        if match := re.match(r"--?(?:no)?(config\.[\w.]+)", argument):
            _check_path(settings, match[1])
    try:
        # DEFINE_config_file uses a deprecated Python API to load the file, and lacks our checks.
        holder = config_flags.DEFINE_config_dict("config", settings, sys_argv=argv, flag_values=values)
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        hint = suggest(f"--{error.flagname}", [f"--{known}" for known in (*values, "config")])
        raise ConfigError(f"unknown flag --{error.flagname}{hint}") from error
    except (flags.Error, AttributeError) as error:  # ml_collections raises it for names such as __class__
        raise ConfigError(str(error)) from error
    if len(rest) > 1:
        near = suggest(rest[1], COMMANDS)
        hint = near.replace("'", "--mode=", 1).replace("'", "") if near else "; flags start with --"
        raise ConfigError(f"unexpected argument {rest[1]!r}{hint}")
    path = to_path(_split(text)[0])
    workdir = path.parent if path.suffix == ".json" else pathlib.Path("runs", path.stem)
    return from_dict(holder.value.to_dict()), workdir


def _take_config_flag(argv: list[str]) -> tuple[str, list[str]]:
    """Return the value of --config=VALUE or --config VALUE, and the other arguments."""
    for position, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            rest = argv[position + 1 :]
            if not equals and rest:
                value, *rest = rest
            if value:
                return value, argv[:position] + rest
    raise ConfigError("missing --config; expected a config file, such as --config=configs/digits.py")


def _take_options(argv: list[str], settings: ConfigDict) -> list[str]:
    """Set the options of samplers and guidance rules; return the other arguments.

    ml_collections only accepts fields that exist. Which options exist depends on the sampler and the rule,
    which check them.
    """
    rest = []
    for argument in argv:
        match = re.fullmatch(r"--?(config\.sampling\.(\w+_options)\.(\w+))(=.*)?", argument, re.DOTALL)
        known: Any = settings.get("sampling") or {}
        if match is None or match[2] not in known:
            rest.append(argument)
            continue
        if not match[4]:
            raise ConfigError(f"missing value of {match[1]}; expected --{match[1]}=VALUE")
        with settings.unlocked():
            known[match[2]] = ConfigDict({**known[match[2]], match[3]: _literal(match[4][1:])})
    return rest


def _literal(text: str) -> Any:
    """Return a number, a list, true, false, none, or else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for parse in (ast.literal_eval, float):
        with contextlib.suppress(ValueError, SyntaxError):
            return parse(text)
    return text


def load_config(text: str) -> ConfigDict:
    """Return the config of FILE.py, FILE.py:ARGUMENT,ARGUMENT or a run's config.json."""
    name, argument = _split(text)
    path = to_path(name)
    if not path.is_file():
        files = [str(other) for other in children(path.parent) if other.suffix == ".py"]
        files = files or ["configs/digits.py"]
        raise ConfigError(f"no such config file: {name!r}{suggest(name, files)}")
    if name.endswith(".json"):
        if argument:
            raise ConfigError(f"--config={text}: {name} takes no argument")
        with naming_environment():
            from dig_jax.components import without_unused_options  # takes a second: it imports JAX

        return ConfigDict(to_dict(without_unused_options(read_settings(path))))
    try:
        with local_copy(path) as file:
            get_config = runpy.run_path(str(file))["get_config"]
        parameters = inspect.signature(get_config).parameters
        if argument and not parameters:
            raise ValueError(f"{name} takes no argument")
        config = get_config(*argument.split(",", len(parameters) - 1) if argument else ())
    except ValueError as error:
        raise ConfigError(f"--config={text}: {one_line(error)}") from error
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise ConfigError(f"--config={text}: {one_line(error, name_type=True)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"invalid --config={text}: get_config returned {type(config).__name__}; expected an"
            " ml_collections.ConfigDict, as configs.base.get_config() returns"
        )
    return config


def _split(text: str) -> tuple[str, str]:
    """Return the file and the argument of FILE.py:ARGUMENT; a file's name may have a colon."""
    if os.path.isfile(os.path.expanduser(text)):
        return text, ""
    scheme, separator, rest = text.partition("://") if re.match("[a-z0-9]+://", text) else ("", "", text)
    name, _, argument = rest.partition(":")
    return scheme + separator + name, argument


def _check_path(settings: ConfigDict, path: str) -> None:
    """Raise a ConfigError unless a dotted path, such as config.model.name, is a field."""
    value: Any = settings
    parent, *names = path.split(".")
    for name in names:
        check_field(parent, name, list(value) if isinstance(value, ConfigDict) else [])
        parent, value = f"{parent}.{name}", value[name]
