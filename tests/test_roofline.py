"""Times of counted programs at the peak rates of chips."""

import dataclasses

import numpy as np
import pytest

from dig_jax.hardware.chips import CHIPS, chip_of_kind
from dig_jax.hardware.hlo_collectives import Collective
from dig_jax.hardware.hlo_cost import Counts
from dig_jax.hardware.roofline import roofline


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    coords: tuple[int, ...]
    process_index: int = 0


def slice_of(*shape):
    return [FakeDevice(tuple(map(int, coords))) for coords in np.ndindex(*shape)]


def exchange(chip, devices, kind="all-reduce", group=None, size=10**9):
    counts = Counts(collectives=[Collective(kind, size, group or tuple(range(len(devices))))])
    return roofline(counts, CHIPS[chip], devices).interconnect


def test_the_bound_is_the_largest_time():
    counts = Counts()
    counts.flops.update({"bfloat16": 197e12, "highest": 197e12})
    counts.bytes = 2 * 819 * 10**9
    times = roofline(counts, CHIPS["v5e"], slice_of(2, 2, 1))
    assert (times.compute, times.memory, times.interconnect) == (7, 2, 0)
    assert (times.seconds, times.bound) == (7, "compute")


def test_a_closed_ring_has_twice_the_links_of_a_line():
    line, ring = exchange("v5e", slice_of(8, 1, 1)), exchange("v5e", slice_of(16, 1, 1))
    assert line == pytest.approx(2 * 7 / 8 * 1e9 / 50e9)
    assert ring == pytest.approx(2 * 15 / 16 * 1e9 / 100e9)
    assert exchange("v5e", slice_of(16, 16, 1)) == pytest.approx(2 * 255 / 256 * 1e9 / 200e9)


def test_a_group_uses_only_the_axes_that_it_spans():
    column = tuple(range(16))  # the last axis of 16 × 16
    devices = [FakeDevice((x, y, 0)) for x in range(16) for y in range(16)]
    assert exchange("v6e", devices, "all-gather", column) == pytest.approx(15 / 16 * 1e9 / 200e9)


def test_the_network_bounds_gpus_of_several_hosts():
    hosts = [FakeDevice((host, 0, i), host) for host in range(4) for i in range(8)]
    assert exchange("h100", hosts[:8]) == pytest.approx(2 * 7 / 8 * 1e9 / 450e9)
    assert exchange("h100", hosts) == pytest.approx(2 * 31 / 32 * 1e9 / 400e9)
    assert exchange("h100", hosts, group=(0, 8, 16, 24)) == pytest.approx(2 * 3 / 4 * 1e9 / 50e9)


def test_a_device_is_matched_by_the_longest_prefix():
    assert chip_of_kind("TPU v5 lite").name == "v5e"
    assert chip_of_kind("TPU v5").name == "v5p"
    assert chip_of_kind("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip_of_kind("cpu") is None
