import pytest
from demo_server import serving

from dig_jax import Sampler
from dig_jax.testing import PlainComponents, tiny_settings


@pytest.fixture(scope="session")
def plain_sampler():
    """The exact denoiser, which compiles fast."""
    return Sampler(PlainComponents(tiny_settings(sampling__steps=2)), {}, step=7)


@pytest.fixture(scope="session")
def running(plain_sampler):
    """A demo of `plain_sampler`."""
    with serving(plain_sampler) as demo:
        yield demo
