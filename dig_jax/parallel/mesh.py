"""The device mesh, and how batches lie on it.

Its axes, in the order of how much they exchange, the least first:

    data      images; parameters whole, gradients added up
    fsdp      images too; parameters, averages and optimiser state in parts, gathered layer by layer
    context   rows of tokens
    tensor    heads, and channels of the MLP
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
    """A mesh over so many devices as the settings say, among which every micro-batch can be divided.

    What exchanges most lies on devices that are near to each other: slices of TPUs, and hosts of GPUs, are
    divided over the first axes.

    Args:
        settings: sizes of the axes; one may be -1, for all devices that the others leave.
        batch_size: images per step.
        accumulation: micro-batches per step.
        devices: all that there are by default; also those of a topology that is not there.

    Raises:
        ConfigError: there are not so many devices, or the batch is not divisible.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = _sizes(settings, len(devices))
    used = math.prod(shape)
    if used < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ConfigError(f"{_written(settings)} is {used} of {len(devices)} devices; several hosts use all")
    split = math.prod(size for name, size in zip(AXES, shape, strict=True) if name in BATCH_AXES)
    if batch_size % (split * accumulation):
        parts = f"{split} devices" + (f" × {accumulation} micro-batches" if accumulation > 1 else "")
        raise ConfigError(
            f"config.data.batch_size={batch_size} is not a multiple of the {parts} that share it"
            f" (config.mesh.data × config.mesh.fsdp)"
        )
    return Mesh(_laid_out(shape, devices[:used]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(settings: config.MeshConfig, present: int) -> tuple[int, ...]:
    """The axes' sizes, with what -1 stands for."""
    sizes = [getattr(settings, name) for name in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if present % fixed:
            raise ConfigError(f"{_written(settings)}: {present} devices are not a multiple of {fixed}")
        sizes[sizes.index(-1)] = present // fixed
    elif fixed > present:
        raise ConfigError(f"{_written(settings)} is {fixed} devices, but there are {present}; -1 takes all")
    return tuple(sizes)


def _written(settings: config.MeshConfig) -> str:
    sizes = {name: getattr(settings, name) for name in AXES}
    return ", ".join(f"config.mesh.{name}={n}" for name, n in sizes.items() if n != 1) or "config.mesh"


def _laid_out(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices [data, fsdp, context, tensor]: near ones along the last axes."""
    # TPUs of a slice, and other devices of a process, are joined by faster links than those between.
    by_process = devices[0].platform != "tpu"
    group = "process_index" if by_process else "slice_index"
    groups = len({getattr(device, group, 0) for device in devices})
    if groups == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer, left = [], groups
    for size in shape:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    return mesh_utils.create_hybrid_device_mesh(
        [size // part for size, part in zip(shape, outer, strict=True)],
        outer,
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def sampling_mesh(mesh: Mesh) -> Mesh:
    """The same devices for sampling: those of fsdp as more of data, since each step needs all parameters."""
    data, fsdp, *rest = mesh.devices.shape
    return Mesh(mesh.devices.reshape(data * fsdp, 1, *rest), mesh.axis_names, axis_types=mesh.axis_types)


def local_mesh() -> Mesh:
    """This process's devices, each with images of its own."""
    shape = (jax.local_device_count(), 1, 1, 1)
    return Mesh(np.array(jax.local_devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices that share a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class BatchShard:
    """Which part of every batch a process reads, `index` of `count`.

    Processes whose devices hold the same images, as they split rows or heads among them, have one index.
    """

    index: int
    count: int


def process_shard(mesh: Mesh) -> BatchShard:
    """This process's part of every batch."""
    places = batch_sharding(mesh).devices_indices_map((batch_shards(mesh),))
    rows: dict[int, set[int]] = {}
    for device, (part,) in places.items():
        rows.setdefault(device.process_index, set()).add(part.start or 0)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != batch_shards(mesh) or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"config.mesh={dict(mesh.shape)} gives processes parts of the batch that overlap;"
            " let hosts divide config.mesh.data × config.mesh.fsdp evenly"
        )
    return BatchShard(parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts))


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch as part of the global arrays; the transfer goes on in the background."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}


def distribute(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A whole batch, the same in every process, as global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
        for name, whole in batch.items()
    }
