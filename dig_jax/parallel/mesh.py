"""The device mesh and the two layouts on it: images split over `data`, parameters whole on every device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dig_jax import config
from dig_jax.errors import ConfigError


def make_mesh(settings: config.Mesh, batch_size: int, accumulation: int = 1) -> Mesh:
    """A mesh over so many devices as the settings say, among which every micro-batch can be divided.

    Raises:
        ConfigError: there are not so many devices, or the batch is not divisible.
    """
    present = jax.device_count()
    devices = present if settings.data == -1 else settings.data
    if not 1 <= devices <= present:
        raise ConfigError(f"config.mesh.data={devices}, but there are 1…{present} devices; -1 takes all")
    if batch_size % (devices * accumulation):
        parts = f"{devices} devices" + (f" × {accumulation} micro-batches" if accumulation > 1 else "")
        raise ConfigError(f"config.data.batch_size={batch_size} is not a multiple of the {parts}")
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch as part of the global arrays; the transfer goes on in the background."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}
