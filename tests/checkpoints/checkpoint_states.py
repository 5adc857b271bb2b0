"""Checkpoints of a small state."""

import contextlib
import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from configs import smoke
from dig_jax import config
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.data import ImageSpec

SETTINGS = config.from_dict(smoke.get_config().to_dict())


IMAGES = ImageSpec((8, 8, 3), ("cat", "dog"))


@contextlib.contextmanager
def not_root():
    """Run as `nobody` if the tests run as root, which may write everywhere."""
    user = os.geteuid()
    if user == 0:
        if not all(os.stat(place).st_mode & stat.S_IXOTH for place in Path(pytest.__file__).parents):
            pytest.skip("the user nobody cannot read the Python environment")
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def make_state(step: int, size: int = 300) -> dict:
    """A state with the structure of a real one: averages by decay, integer keys, scalars."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 3)
    params, *averages = ({"w": jax.random.normal(key, (size,)), "b": {0: jnp.ones(3)}} for key in keys)
    ema = {str(decay): average for decay, average in zip((0.9, 0.99), averages, strict=True)}
    return {
        "step": jnp.int32(step),
        "params": params,
        "ema": ema,
        "opt_state": ({"count": jnp.int32(step)}, ()),
    }


def abstract(state: dict) -> dict:
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def save(
    workdir: Path, *steps: int, size: int = 300, settings: config.CheckpointConfig = SETTINGS.checkpoint
) -> None:
    with contextlib.closing(Checkpoints(workdir, settings)) as checkpoints:
        for step in steps:
            checkpoints.save(
                step, make_state(step, size), {"examples": 16 * step, **IMAGES.to_dict()}, SETTINGS
            )
        checkpoints.wait()


def restore(workdir: Path, size: int = 300):
    with contextlib.closing(Checkpoints(workdir, SETTINGS.checkpoint)) as checkpoints:
        return checkpoints.restore(abstract(make_state(0, size)))


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


RETENTION = config.CheckpointConfig(
    every_steps=1, every_minutes=None, keep=1, keep_best=0, keep_every_steps=None
)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)
