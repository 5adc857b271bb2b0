"""The defaults of all fields. Other configs list only changes.

docs/reference/config_reference.md describes the fields.
"""

from ml_collections import ConfigDict

from dig_jax.config import Config, to_dict


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(Config()))
