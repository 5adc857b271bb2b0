"""Collectives of an optimized HLO module: their kind, their size and the devices that communicate."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from dig_jax.hardware.hlo_parser import HloInstruction, HloModule, arrays, integers

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    bytes: size of the input of a device (of the output for an all-gather), over all executions.
    group: devices that communicate, as indices in the order of the mesh.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]


def collectives(
    module: HloModule, scope: Mapping[str, HloInstruction], x: HloInstruction
) -> list[Collective]:
    """Return the collectives of an instruction, which may be a fusion.

    Raises:
        ValueError: unsupported notation of the devices.
    """
    if x.opcode == "fusion":
        name = x.called("calls")
        inner = [c for y in module[name].values() for c in collectives(module, module[name], y)]
        if name.startswith("%all-reduce-scatter"):
            inner = [dataclasses.replace(c, kind="reduce-scatter") for c in inner]
        return inner
    kind = x.opcode.removesuffix("-start")
    if kind not in _KINDS:
        return []
    group = _group(x.attributes)
    size = sum(array.bytes for name in x.operands for array in arrays(scope[name].shape))
    return [Collective(kind, size * (len(group) if kind == "all-gather" else 1), group)]


def _group(attributes: str) -> tuple[int, ...]:
    """Parse the first group of devices, in any of the four notations."""
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(map(int, pair.groups()))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return integers(listed[1])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return tuple(_transposed_iota(iota[3], iota[4])[: int(iota[2])])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        attributes,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
        positions = _mesh_group(sizes, re.findall(r"('\w+')(?::\((\d+)\)(\d+))?", mesh[4]))
        if not mesh[2]:
            return positions
        numbers = _transposed_iota(mesh[2], mesh[3])
        return tuple(numbers[position] for position in positions)
    raise ValueError(f"unsupported devices of a collective: got {attributes[:200]}")


def _transposed_iota(sizes_text: str, order_text: str | None) -> list[int]:
    """Return 0, 1, … as an array of these sizes, transposed and flattened."""
    sizes = integers(sizes_text)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in integers(order_text) if order_text else range(len(sizes)):
        numbers = [number + i * strides[axis] for number in numbers for i in range(sizes[axis])]
    return numbers


def _mesh_group(sizes: Mapping[str, int], axes: Iterable[tuple[str, str, str]]) -> tuple[int, ...]:
    """Return the group of device 0 along mesh axes, or along a sub-axis: 'axis':(size before)size."""
    names = list(sizes)
    numbers = [0]
    for name, before, sub_size in axes:
        stride = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
        length = int(sub_size) if sub_size else sizes[name]
        if sub_size:
            stride *= sizes[name] // (int(before) * length)
        numbers = [number + i * stride for number in numbers for i in range(length)]
    return tuple(numbers)
