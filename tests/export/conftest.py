import pytest

from dig_jax.testing import tiny_settings, write_checkpoint


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A workdir that tests must not change, and its trees of parameters by name."""
    path = tmp_path_factory.mktemp("run")
    return path, write_checkpoint(path, tiny_settings(), step=7)


@pytest.fixture(scope="session")
def workdir(run):
    return run[0]
