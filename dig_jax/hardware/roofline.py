"""The least time that a counted program takes on chips of known peaks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dig_jax.hardware.chips import Chip
from dig_jax.hardware.hlo_cost import Collective, Counts


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of each kind of work, were it alone; all of it overlapping, a program takes the largest."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = dataclasses.asdict(self)
        return max(times, key=times.get)


def roofline(counts: Counts, chip: Chip, devices: Sequence[Any]) -> Roofline:
    """The times of one device's counts.

    Args:
        devices: of JAX, in the order of the mesh, which is how collectives number them.
    """
    return Roofline(
        compute=chip.devices * sum((n / chip.flops[kind] for kind, n in counts.flops.items()), 0.0),
        memory=counts.bytes * chip.devices / chip.bandwidth,
        interconnect=sum((_exchange(collective, chip, devices) for collective in counts.collectives), 0.0),
    )


# Bytes that a device sends in a ring of n, over the bytes of the array (Thakur et al. 2005).
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
    """Bytes per second that each device of a group can send at best, while all groups do."""
    if chip.network:
        hosts = {device.process_index for device in group}
        # A host's GPUs send together, each through a port of its own.
        across = chip.network * len(group) / len(hosts)
        return chip.link if len(hosts) == 1 else min(chip.link, across)
    if kind == "collective-permute":
        return chip.link / chip.devices
    spread = np.ptp([device.coords for device in group], axis=0) > 0
    whole = np.ptp([device.coords for device in devices], axis=0) + 1
    # Both ways around a ring; on a line, what comes back takes the other direction of the same links.
    links = sum(2 if size % chip.ring == 0 else 1 for size, used in zip(whole, spread, strict=True) if used)
    return chip.link * max(links, 1) / chip.devices
