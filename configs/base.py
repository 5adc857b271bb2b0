"""The defaults of all fields. docs/config_reference.md describes them; other configs list only changes."""

from ml_collections import ConfigDict

from dig_jax.config import Config, to_dict


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(Config()))
