"""Generate docs/reference/config_reference.md, the reference of all fields.

python -m dig_jax.config.reference > docs/reference/config_reference.md
"""

import dataclasses
import sys
from collections.abc import Iterator

from dig_jax.config.conversion import to_dict
from dig_jax.config.field import Group
from dig_jax.config.fields import Config

_HEAD = """\
# Configuration reference

All config fields with their defaults. Set a field on the command line with `--config.FIELD=VALUE`.
[configs.md](configs.md) describes the configs in `configs/`.

Defaults are DiG's published recipe (Zhu et al. 2025, section 4.1, and the released training script), where
there is one.

This page is generated from the dataclasses in `dig_jax/config/` by
`python -m dig_jax.config.reference > docs/reference/config_reference.md`.
"""


def markdown() -> str:
    """Return a section and a table of fields for the top level and for each group."""
    return "\n".join([_HEAD, *_section(Config(), "Top level", "")])


def _section(group: Group, name: str, prefix: str) -> Iterator[str]:
    groups, values = {}, to_dict(group)
    yield f"## {name}\n\n{type(group).__doc__}\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, Group):
            groups[field.name] = value
        else:
            kind, default = _type_name(values[field.name]), _text(values[field.name])
            yield f"| `{prefix}{field.name}` | {kind} | {default} | {field.metadata['description']} |"
    yield ""
    for name, value in groups.items():
        yield from _section(value, name, f"{name}.")


def _type_name(value: object) -> str:
    return "tuple of float" if isinstance(value, tuple) else type(value).__name__


def _text(value: object) -> str:
    return '`""`' if value == "" else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(markdown())
