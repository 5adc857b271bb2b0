"""--mode=doctor: what this machine can run, and what keeps it from running more."""

import sys
from collections.abc import Callable, Iterator

from dig_jax.config import Config
from dig_jax.doctor import kernels, machine
from dig_jax.doctor.finding import Finding
from dig_jax.errors import UserError, one_line
from dig_jax.files.paths import Path


def doctor(settings: Config, workdir: Path) -> None:
    """Print findings about this machine, the config's model and its data.

    Args:
        settings: the config; that of no file stands for no config.
        workdir: the run's directory, which need not exist.

    Raises:
        UserError: there is a problem.
    """
    problems = 0
    for name, finding in _findings(settings, workdir):
        problems += finding.is_problem
        first, *rest = finding.lines
        sys.stdout.write(f"{'!' if finding.is_problem else ' '} {name:10}{first}\n")
        sys.stdout.writelines(f"{'':12}{line}\n" for line in rest)
        sys.stdout.flush()
    if problems:
        raise UserError(f"{problems} problem{'s' if problems > 1 else ''}; see the lines that start with !")


def _findings(settings: Config, workdir: Path) -> Iterator[tuple[str, Finding]]:
    """Yield the findings by name, each as soon as it is known."""
    checks: dict[str, Callable[[], Finding]] = {
        "program": machine.program,
        "extras": machine.extras,
        "devices": machine.devices,
    }
    if settings == Config():
        for name in kernels.MODELS:
            checks[name] = lambda name=name: kernels.default_model(name)
    else:
        checks |= {
            "data": lambda: kernels.data(settings),
            settings.model.name: lambda: kernels.model(settings),
        }
    checks |= {
        "cache": machine.cache,
        "disk": lambda: machine.disk(workdir),
        "memory": machine.memory,
        "network": machine.network,
    }
    for name, check in checks.items():
        try:
            yield name, check()
        except Exception as error:  # the other findings matter all the more
            yield name, Finding.problem(one_line(error, name_type=not isinstance(error, UserError)))
