"""The names that other code builds on, and what importing them costs."""

import subprocess
import sys

import pytest

import dig_jax


@pytest.mark.parametrize("name", dig_jax.__all__)
def test_every_public_name_is_importable(name):
    assert getattr(dig_jax, name) is not None
    assert name in dir(dig_jax)


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        dig_jax.lode  # noqa: B018


def test_importing_dig_jax_alone_imports_neither_jax_nor_flax():
    code = "import sys, dig_jax; sys.exit(bool(sys.modules.keys() & {'jax', 'flax', 'orbax', 'grain'}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
