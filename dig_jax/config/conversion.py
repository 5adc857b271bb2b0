"""Conversion between the dataclasses and nested dicts (ConfigDict, config.json), and comparison of configs.

In dicts a field without a value has its external form, such as 0, "" or "none"; in dataclasses it is None.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from dig_jax.config.field import Group
from dig_jax.config.fields import Config
from dig_jax.errors import ConfigError, InvalidFile, one_line, suggest
from dig_jax.files.json_file import read_json
from dig_jax.files.paths import Path

# Fields that may differ when a workdir is resumed, and that change what it learns: a resumed run announces
# them. The position in the data is a number of examples, so the batch size may change.
_ANNOUNCED = ("data.batch_size", "training.steps", "optimizer.learning_rate", "optimizer.warmup_steps")
_ANNOUNCED += ("optimizer.schedule", "optimizer.final_fraction")
# Fields that may differ and compute the same function. Data may move, because the fingerprint of its content
# is compared too, and latents store the fingerprint of their autoencoder.
_CHANGEABLE = (*_ANNOUNCED, "training.accumulation", "training.max_skipped_steps")
_CHANGEABLE += ("model.remat", "model.mlp_parts", "model.implementation")
_CHANGEABLE += ("logging", "checkpoint", "sampling", "evaluation", "mesh", "autoencoder", "encode", "plan")
_LOCATIONS = ("path", "heldout_path", "data_dir", "dataset", "cache_dir")
_CHANGEABLE += tuple(f"data.options.{name}" for name in _LOCATIONS)


def from_dict(settings: Mapping[str, Any]) -> Config:
    """Return the dataclasses for a nested dict, as in a ConfigDict or in config.json.

    Missing fields have their defaults, because configs of older versions lack newer fields.

    Raises:
        ConfigError: a field is unknown, or its value is invalid.
    """
    return _build(Config, settings, "config")


def to_dict(settings: Any) -> dict[str, Any]:
    """Return a config or a group of fields as a nested dict in the external form; inverts `from_dict`."""
    fields = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, dict):
            value = dict(value)
        fields[field.name] = field.metadata["none"] if value is None else value
    return fields


def read_settings(path: Path) -> Config:
    """Return the config in a workdir's config.json.

    Raises:
        ConfigError: the file is unreadable, or was written by a different version.
    """
    try:
        stored = read_json(path)["config"]
    except (InvalidFile, KeyError, OSError) as error:
        raise ConfigError(
            f"cannot read {path}: {one_line(error, name_type=True)}; delete it (checkpoints contain a copy)"
        ) from error
    try:
        return from_dict(stored)
    except ConfigError as error:
        raise ConfigError(f"{path} was written by a different version or edited by hand: {error}") from error


def check_same(old: Config, new: Config, workdir: object) -> None:
    """Check that two configs differ only in fields that may change when a workdir is resumed.

    Raises:
        ConfigError: other fields differ; the message lists them as "field: old → new".
    """
    changed = [
        text
        for name, text in _changes(old, new).items()
        if name not in _CHANGEABLE and name.split(".")[0] not in _CHANGEABLE
    ]
    if changed:
        raise ConfigError(
            f"{workdir} was created with different settings: {'; '.join(changed)}. Restore those settings, or"
            f" use a new --workdir, with --config.init_from={workdir} to start from its parameters"
        )


def announced_changes(old: Config, new: Config) -> list[str]:
    """Return the changes, as "field: old → new", that a resumed run announces."""
    return [text for name, text in _changes(old, new).items() if name in _ANNOUNCED]


def _changes(old: Config, new: Config) -> dict[str, str]:
    """Return the fields that differ and "field: old → new"."""
    old_fields, new_fields = flattened(to_dict(old)), flattened(to_dict(new))
    return {
        name: f"{name}: {old_fields.get(name)!r} → {new_fields.get(name)!r}"
        for name in sorted(old_fields | new_fields)
        if old_fields.get(name) != new_fields.get(name)
    }


def check_field(path: str, name: str, choices: Iterable[str]) -> None:
    """Check that a group has a field of this name.

    Raises:
        ConfigError: unknown field; the message suggests the most similar name or lists all names.
    """
    choices = list(choices)
    if name not in choices:
        hint = suggest(name, choices) or f"; expected {', '.join(choices) or f'{path} only'}"
        raise ConfigError(f"unknown field {path}.{name}{hint}")


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by their dotted names; tuples become lists, as in JSON."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _build(cls: type[Group], settings: Any, path: str) -> Any:
    if not isinstance(settings, Mapping):
        raise ConfigError(f"invalid {path}={settings!r}; expected a group of fields")
    kinds, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    for name in settings:
        check_field(path, name, [field.name for field in fields])
    values = {}
    for field in fields:
        kind, here = kinds[field.name], f"{path}.{field.name}"
        if field.name not in settings:
            continue
        if isinstance(kind, type) and issubclass(kind, Group):
            values[field.name] = _build(kind, settings[field.name], here)
        else:
            values[field.name] = _typed(settings[field.name], kind, here)
    return cls(**values)


def _typed(value: Any, kind: Any, path: str) -> Any:
    """Return a field's value as its declared type, or raise a ConfigError."""
    if typing.get_origin(kind) is types.UnionType:
        return None if value is None else _typed(value, typing.get_args(kind)[0], path)
    origin = typing.get_origin(kind) or kind
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_typed(item, typing.get_args(kind)[0], path) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not origin:
        raise ConfigError(
            f"invalid {path}={value!r}; expected a value of type {getattr(kind, '__name__', kind)}"
        )
    return value
