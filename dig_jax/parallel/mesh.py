"""The device mesh and the sharding of batches.

The mesh axes, from the least to the most communication:

    data      shards images; parameters are replicated, gradients are summed
    fsdp      shards images; parameters, averages and optimizer state too, which layers gather
    context   shards rows of tokens
    tensor    shards heads and the channels of the MLP
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dig_jax import config
from dig_jax.errors import ConfigError

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    settings: config.MeshConfig,
    batch_size: int,
    accumulation: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Create the device mesh.

    The last axes, which communicate most, stay within a TPU slice or a GPU host where possible.

    Args:
        settings: sizes of the axes; -1 for one of them takes the remaining devices.
        batch_size: images per step.
        accumulation: micro-batches per step.
        devices: default: all devices; the planner passes the devices of a topology.

    Raises:
        ConfigError: too few devices, or a micro-batch that the devices do not divide.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _sizes(settings, len(devices))
    used = math.prod(shape)
    if used < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ConfigError(
            f"{_format(settings)} uses {used} of {len(devices)} devices;"
            " expected all devices if there are several hosts"
        )
    shards = math.prod(size for name, size in zip(AXES, shape, strict=True) if name in BATCH_AXES)
    if batch_size % (shards * accumulation):
        factors = f"{shards} devices (config.mesh.data × config.mesh.fsdp)"
        if accumulation > 1:
            factors += f" × {accumulation} micro-batches (config.training.accumulation)"
        raise ConfigError(f"invalid config.data.batch_size={batch_size}; expected a multiple of {factors}")
    return Mesh(_device_grid(shape, devices[:used]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(settings: config.MeshConfig, present: int) -> tuple[int, ...]:
    """Return the sizes of the axes, with -1 resolved."""
    sizes = [getattr(settings, name) for name in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if present % fixed:
            raise ConfigError(f"{_format(settings)} needs a multiple of {fixed} devices; got {present}")
        sizes[sizes.index(-1)] = present // fixed
    elif fixed > present:
        raise ConfigError(f"{_format(settings)} needs {fixed} devices; got {present} (-1 uses all devices)")
    return tuple(sizes)


def _format(settings: config.MeshConfig) -> str:
    sizes = {name: getattr(settings, name) for name in AXES}
    return ", ".join(f"config.mesh.{name}={n}" for name, n in sizes.items() if n != 1) or "config.mesh"


def _device_grid(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Arrange devices [data, fsdp, context, tensor], with the fastest links along the last axes."""
    # Links are fast within a TPU slice, and on other platforms within a process.
    by_process = devices[0].platform != "tpu"
    group = "process_index" if by_process else "slice_index"
    groups = len({getattr(device, group, 0) for device in devices})
    if groups == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer, remaining = [], groups
    for size in shape:
        outer.append(math.gcd(size, remaining))
        remaining //= outer[-1]
    return mesh_utils.create_hybrid_device_mesh(
        [size // factor for size, factor in zip(shape, outer, strict=True)],
        outer,
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def sampling_mesh(mesh: Mesh) -> Mesh:
    """Return the mesh for sampling: `fsdp` is merged into `data`, since every step needs all parameters."""
    data, fsdp, *rest = mesh.devices.shape
    return Mesh(mesh.devices.reshape(data * fsdp, 1, *rest), mesh.axis_names, axis_types=mesh.axis_types)


def local_mesh() -> Mesh:
    """Return a mesh of this process's devices along `data`."""
    shape = (jax.local_device_count(), 1, 1, 1)
    return Mesh(np.array(jax.local_devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the first dimension over `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Return the number of shards of a batch."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that are replicated on all devices."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class BatchShard:
    """The shard of every batch that a process reads: `index` of `count`.

    Processes that share images, because `context` or `tensor` spans them, have the same index.
    """

    index: int
    count: int


def process_shard(mesh: Mesh) -> BatchShard:
    """Return the shard of every batch that this process reads.

    Raises:
        ConfigError: the mesh gives processes overlapping shards.
    """
    places = batch_sharding(mesh).devices_indices_map((batch_shards(mesh),))
    starts: dict[int, set[int]] = {}
    for device, (rows,) in places.items():
        starts.setdefault(device.process_index, set()).add(rows.start or 0)
    shards = sorted({tuple(sorted(rows)) for rows in starts.values()})
    if sum(map(len, shards)) != batch_shards(mesh) or len({len(rows) for rows in shards}) > 1:
        raise ConfigError(
            f"invalid config.mesh={dict(mesh.shape)}: processes would read overlapping parts of the batch;"
            " expected the hosts to divide config.mesh.data × config.mesh.fsdp evenly"
        )
    return BatchShard(shards.index(tuple(sorted(starts[jax.process_index()]))), len(shards))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays from this process's shard of a batch; the transfer is asynchronous."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # implicit, according to JAX, with several processes
        return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def distribute(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays from a complete batch, which must be the same on every process."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}
