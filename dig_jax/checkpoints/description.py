"""The description of a run that checkpoints, exported files and config.json share."""

import importlib.metadata
from typing import Any

from dig_jax.config import Config, to_dict

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def config_and_versions(settings: Config) -> dict[str, Any]:
    """Return {"config": the settings as a nested dict, "versions": package versions by name}."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"config": to_dict(settings), "versions": versions}
