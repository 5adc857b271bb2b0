import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from dig_jax import config
from dig_jax.errors import ConfigError
from dig_jax.parallel import make_mesh, to_global


@pytest.mark.parametrize(("data", "devices"), [(-1, 4), (4, 4), (2, 2), (1, 1)])
def test_the_mesh_has_as_many_devices_as_asked_for(data, devices):
    assert make_mesh(config.Mesh(data=data, cpu_devices=1), 8).shape == {"data": devices}


@pytest.mark.parametrize(
    ("data", "batch_size", "accumulation", "message"),
    [
        (5, 20, 1, "config.mesh.data=5, but there are 1…4 devices; -1 takes all"),
        (0, 20, 1, "config.mesh.data=0, but there are 1…4 devices"),
        (-2, 20, 1, "config.mesh.data=-2, but"),
        (-1, 6, 1, "config.data.batch_size=6 is not a multiple of the 4 devices"),
        (2, 6, 2, "config.data.batch_size=6 is not a multiple of the 2 devices × 2 micro-batches"),
    ],
)
def test_a_batch_that_devices_cannot_share_is_refused(data, batch_size, accumulation, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(config.Mesh(data=data, cpu_devices=1), batch_size, accumulation)


def test_every_device_holds_its_part_of_a_batch():
    mesh = make_mesh(config.Mesh(data=-1, cpu_devices=1), 8)
    image = np.arange(8.0)[:, None]
    batch = to_global({"image": image}, mesh)["image"]
    assert isinstance(batch, jax.Array)
    for device, shard in zip(mesh.devices.flat, batch.addressable_shards, strict=True):
        assert shard.device == device
        np.testing.assert_array_equal(shard.data, image[shard.index])
        assert shard.data.shape == (2, 1)


def test_a_cpu_is_split_into_devices_unless_xla_flags_say_how_many():
    code = "from dig_jax.parallel import prepare_cpu; prepare_cpu(2); import jax; print(jax.device_count())"
    for flags, expected in (("", "2"), ("--xla_force_host_platform_device_count=3", "3")):
        environment = os.environ | {"XLA_FLAGS": flags}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
