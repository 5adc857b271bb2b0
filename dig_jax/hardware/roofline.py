"""Lower bounds for the time of a program on chips with known peak rates."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dig_jax.hardware.chips import Chip
from dig_jax.hardware.hlo_collectives import Collective
from dig_jax.hardware.hlo_cost import Counts


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of compute, memory traffic and communication. If they overlap fully, the largest counts."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The largest of the three times."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Name of the largest time."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def roofline(counts: Counts, chip: Chip, devices: Sequence[Any]) -> Roofline:
    """Return the times for the counts of one device.

    Args:
        devices: the devices in the order of the mesh, by which collectives number them.
    """
    return Roofline(
        compute=chip.devices * sum((n / chip.flops[kind] for kind, n in counts.flops.items()), 0.0),
        memory=counts.bytes * chip.devices / chip.bandwidth,
        interconnect=sum((_exchange(collective, chip, devices) for collective in counts.collectives), 0.0),
    )


# Bytes that a device sends in a ring of n devices, per byte of the array (Thakur et al. 2005).
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


def _exchange(collective: Collective, chip: Chip, devices: Sequence[Any]) -> float:
    group = [devices[number] for number in collective.group]
    if len(group) == 1:
        return 0.0
    sent = collective.bytes * _SENT.get(collective.kind, lambda n: (n - 1) / n)(len(group))
    return sent / _bandwidth(collective.kind, chip, group, devices)


def _bandwidth(kind: str, chip: Chip, group: Sequence[Any], devices: Sequence[Any]) -> float:
    """Return the peak bytes/s that each device of a group can send while all groups communicate."""
    if chip.network:
        hosts = {device.process_index for device in group}
        # The GPUs of a host send in parallel, each through a separate port.
        across = chip.network * len(group) / len(hosts)
        return chip.link if len(hosts) == 1 else min(chip.link, across)
    if kind == "collective-permute":
        return chip.link / chip.devices
    spans = np.ptp([device.coords for device in group], axis=0) > 0
    sizes = np.ptp([device.coords for device in devices], axis=0) + 1
    # A ring has two links per device and axis. On a line, data returns over the same link.
    links = sum(2 if size % chip.ring == 0 else 1 for size, used in zip(sizes, spans, strict=True) if used)
    return chip.link * max(links, 1) / chip.devices
