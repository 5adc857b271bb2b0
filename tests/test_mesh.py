import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dig_jax import config
from dig_jax.errors import ConfigError
from dig_jax.parallel import make_mesh, to_global


def mesh_settings(**sizes) -> config.MeshConfig:
    return config.MeshConfig(**({"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "cpu_devices": 1} | sizes))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": -1}, (4, 1, 1, 1)),
        ({"data": 2}, (2, 1, 1, 1)),
        ({}, (1, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, (2, 2, 1, 1)),
        ({"data": 2, "tensor": -1}, (2, 1, 1, 2)),
        ({"context": 2, "fsdp": -1}, (1, 2, 2, 1)),
    ],
)
def test_the_mesh_has_the_axes_that_are_asked_for(sizes, shape):
    mesh = make_mesh(mesh_settings(**sizes), 8)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "context", "tensor"), shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "batch_size", "accumulation", "message"),
    [
        ({"data": 5}, 20, 1, "config.mesh.data=5 needs 5 devices; got 4 .-1 uses all"),
        (
            {"data": 2, "tensor": 4},
            20,
            1,
            "config.mesh.data=2, config.mesh.tensor=4 needs 8 devices; got 4",
        ),
        ({"data": -1, "fsdp": 3}, 24, 1, "config.mesh.fsdp=3 needs a multiple of 3 devices; got 4"),
        ({"data": -1}, 6, 1, "invalid config.data.batch_size=6; expected a multiple of 4 devices"),
        ({"data": 2, "fsdp": 2}, 6, 1, "invalid config.data.batch_size=6; expected a multiple of 4 devices"),
        (
            {"data": 2},
            6,
            2,
            "invalid config.data.batch_size=6; expected a multiple of 2 devices .* × 2 micro-batches",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_devices_or_batch_is_rejected(sizes, batch_size, accumulation, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(mesh_settings(**sizes), batch_size, accumulation)


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}, {"data": -1, "tensor": -1}, {"cpu_devices": 0}])
def test_invalid_sizes_are_rejected(sizes):
    with pytest.raises(ConfigError, match="config.mesh"):
        mesh_settings(**sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that decide its place in a mesh."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "made up"


def test_hosts_are_divided_over_the_axes_that_communicate_least():
    """Three hosts of four GPUs; heads stay within a host."""
    devices = [Device(number, number // 4) for number in range(12)]
    mesh = make_mesh(mesh_settings(data=3, fsdp=2, tensor=2), 24, devices=devices)
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    assert (hosts == np.arange(3)[:, None, None, None]).all()
    with pytest.raises(ConfigError, match="config.mesh.data=2 uses 2 of 12 devices; expected all"):
        make_mesh(mesh_settings(data=2), 24, devices=devices)


def test_every_device_holds_its_shard_of_a_batch():
    mesh = make_mesh(mesh_settings(data=-1), 8)
    image = np.arange(8.0)[:, None]
    batch = to_global({"image": image}, mesh)["image"]
    assert isinstance(batch, jax.Array)
    for device, shard in zip(mesh.devices.flat, batch.addressable_shards, strict=True):
        assert shard.device == device
        np.testing.assert_array_equal(shard.data, image[shard.index])
        assert shard.data.shape == (2, 1)


def test_a_cpu_is_split_into_devices_unless_xla_flags_say_how_many():
    code = "from dig_jax.runtime import prepare_cpu; prepare_cpu(2); import jax; print(jax.device_count())"
    for flags, expected in (("", "2"), ("--xla_force_host_platform_device_count=3", "3")):
        environment = os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
