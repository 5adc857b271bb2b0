"""The program: main.py in a clone, `dig-jax` where the package is installed."""

import functools
import os
import sys

from dig_jax.cli import command_line, commands, help
from dig_jax.cli.flags import define_flags


def main() -> None:
    """Run the command line."""
    # Python does this for main.py; configs import from the package configs beside them.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    values = define_flags()
    command_line.run(functools.partial(commands.run, values), help.text, values)
