"""What one device does in a compiled program: an optimised HLO module, counted with its loops' turns.

`Compiled.cost_analysis` counts the body of a loop once, and knows nothing of kernels; so the module's text
is read. Counted are the flops of matrix products and convolutions, those that kernels say of themselves (a
TPU's do, a GPU's program does not carry them), the bytes that cross the device's memory (not those of arrays
that the compiler placed on the chip), and what collectives exchange. Of elementwise arithmetic the bytes
count, and not the flops.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping

from dig_jax.hardware.hlo_parser import Instruction, Module, arrays, parse

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They move nothing: names of what is there, or the second half of what was counted at its start.
_FREE = (
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "iota",
    "partition-id",
)
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding")
_ASYNC_CALL = "async-start"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: `bytes` is the size of the whole array that a device gives (gather: gets), in all turns.

    group: devices that take part together, as numbers in the order of the mesh.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]


@dataclasses.dataclass
class Counts:
    """Of one device, in one run: flops by what is multiplied (see `Chip.flops`), bytes, exchanges."""

    flops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes: int = 0
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def add(self, other: "Counts", times: int = 1) -> None:
        """Adds what runs so many times."""
        for kind, flops in other.flops.items():
            self.flops[kind] += flops * times
        self.bytes += other.bytes * times
        self.collectives += [dataclasses.replace(c, bytes=c.bytes * times) for c in other.collectives]

    def exchanged(self) -> dict[str, int]:
        """Bytes of the collectives by kind."""
        total = collections.Counter()
        for collective in self.collectives:
            total[collective.kind] += collective.bytes
        return dict(total)


def count(text: str) -> Counts:
    """Counts an optimised module, as `Compiled.as_text()` gives it.

    Raises:
        ValueError: a loop whose number of turns cannot be read.
    """
    module = parse(text)
    return _computation(module, module.entry)


def _computation(module: Module, name: str) -> Counts:
    """What a computation does that is run, and not fused."""
    counts = Counts()
    for instruction in module[name].values():
        opcode = instruction.opcode
        if opcode == "while":
            body = _computation(module, instruction.called("body"))
            counts.add(body, _turns(module, instruction))
        elif opcode == "conditional":
            branches = [_computation(module, branch) for branch in instruction.branches()]
            counts.add(max(branches, key=lambda branch: branch.bytes))
        elif opcode in ("call", _ASYNC_CALL):
            counts.add(_computation(module, instruction.called("to_apply", "calls")))
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            counts.flops.update(_flops(module, module[name], instruction))
            counts.bytes += _bytes(module, module[name], instruction)
            counts.collectives += _collectives(module, module[name], instruction)
    return counts


def _turns(module: Module, loop: Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    # A loop of `lax.scan` counts up to a constant.
    condition = module[loop.called("condition")].values()
    bounds = [re.match(r"\d+", x.operands_text) for x in condition if x.opcode == "constant"]
    if not any(bounds):
        raise ValueError(f"the number of turns of the loop {loop.name} cannot be read")
    return max(int(bound[0]) for bound in bounds if bound)


# Flops.


def _flops(module: Module, scope: Mapping[str, Instruction], x: Instruction) -> collections.Counter[str]:
    flops = collections.Counter()
    if x.opcode == "fusion":
        body = module[x.called("calls")]
        for inner in body.values():
            flops.update(_flops(module, body, inner))
    elif x.opcode == "dot":
        flops[_multiplied(scope, x)] += _dot(scope, x)
    elif x.opcode == "convolution" or x.target.startswith("__cudnn$conv"):
        flops[_multiplied(scope, x)] += _convolution(scope, x)
    elif x.target.startswith("__cublas"):
        flops[_multiplied(scope, x)] += _cublas(scope, x)
    elif estimate := _estimate(x):
        flops["bfloat16"] += int(estimate["flops"])
    return flops


def _multiplied(scope: Mapping[str, Instruction], x: Instruction) -> str:
    types = {array.dtype for name in x.operands[:2] for array in arrays(scope[name].shape)}
    if types & {"f32", "f64"}:
        return "highest" if "highest" in x.attributes else "float32"
    return "bfloat16"


def _dims(scope: Mapping[str, Instruction], name: str) -> tuple[int, ...]:
    return arrays(scope[name].shape)[0].dims


def _dot(scope: Mapping[str, Instruction], x: Instruction) -> int:
    left = _dims(scope, x.operands[0])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
    return 2 * math.prod(arrays(x.shape)[0].dims) * math.prod(left[axis] for axis in _integers(contracted[1]))


def _cublas(scope: Mapping[str, Instruction], x: Instruction) -> int:
    left = _dims(scope, x.operands[0])
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)
    axes = _integers(contracted[1].replace('"', ""))
    return 2 * math.prod(arrays(x.shape)[0].dims) * math.prod(left[axis] for axis in axes)


def _convolution(scope: Mapping[str, Instruction], x: Instruction) -> int:
    """Multiply-adds with what is not padding: a TPU's batched products are convolutions over padding."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes).groups()
    inputs, kernel = (_dims(scope, name) for name in x.operands[:2])
    result = arrays(x.shape)[0].dims
    sizes = {"b": result[out.index("b")], "f": result[out.index("f")], "i": kernel[right.index("i")]}
    total = 2 * math.prod(sizes.values())
    window = dict(
        re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", x.attributes) or [""])[0])
    )
    for axis, label in enumerate(sorted(filter(str.isdigit, out))):
        padding = window["pad"].split("x")[axis] if "pad" in window else "0_0"
        stride, spread, dilation = (
            int(window[name].split("x")[axis]) if name in window else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        total *= _met(
            inputs[left.index(label)],
            kernel[right.index(label)],
            result[out.index(label)],
            int(padding.split("_")[0]),
            stride,
            spread,
            dilation,
        )
    return total


@functools.cache
def _met(size: int, kernel: int, out: int, before: int, stride: int, spread: int, dilation: int) -> int:
    """Pairs of an output and a place of the kernel along an axis that meet an input."""
    places = (o * stride - before + k * dilation for o in range(out) for k in range(kernel))
    return sum(0 <= place <= (size - 1) * spread and place % spread == 0 for place in places)


def _estimate(x: Instruction) -> dict[str, str] | None:
    """What a kernel says of itself (`pl.CostEstimate`); only a TPU's program carries it."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', x.attributes)
    return json.loads(found[1]) if found else None


# Bytes.


def _bytes(module: Module, scope: Mapping[str, Instruction], x: Instruction) -> int:
    read = [_size(scope[name].shape) for name in x.operands if name in scope]
    written = _size(x.shape)
    if x.opcode == "fusion":
        return _fusion(module, x, read)
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return written + min(_size(x.shape, on_chip=True), read[0])
    if x.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if x.opcode == "scatter":
        return 3 * read[-1]
    if x.opcode == "copy-start":
        return sum(_size(part) for part in x.parts()[:2])
    if x.opcode == "slice-start":
        sliced = x.parts()[1]
        return _size(sliced) + min(_size(sliced, on_chip=True), read[0])
    if x.opcode == "custom-call":
        if x.target in _FREE_CALLS:
            return 0
        if estimate := _estimate(x):
            # The kernel does not know which of its arrays stay on the chip.
            everything = sum(_size(scope[name].shape, on_chip=True) for name in x.operands)
            on_chip = everything + _size(x.shape, on_chip=True) - sum(read) - written
            return max(int(estimate["bytes_accessed"]) - on_chip, 0)
        if x.target.startswith("__cu"):
            written = _size(x.parts()[0])  # the rest is scratch
    return written + sum(read)


def _fusion(module: Module, x: Instruction, read: list[int]) -> int:
    name = x.called("calls")
    body = module[name]
    parameters = {int(y.operands_text): y for y in body.values() if y.opcode == "parameter"}
    total = sum(_needed(module, body, y, read[position]) for position, y in parameters.items())
    return total + _stored(module, body, module.roots[name], x.shape)


def _needed(module: Module, scope: Mapping[str, Instruction], x: Instruction, whole: int) -> int:
    """Bytes of an operand that a fused computation reads: the part, where it only takes parts."""
    total = 0
    for user in scope.values():
        if x.name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == x.name:
            total += _size(user.shape, on_chip=True)
        elif user.opcode == "bitcast":
            total += _needed(module, scope, user, whole)
        elif user.opcode == "fusion":
            inner = module[user.called("calls")]
            total += sum(
                _needed(module, inner, y, whole)
                for y in inner.values()
                if y.opcode == "parameter" and user.operands[int(y.operands_text)] == x.name
            )
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != x.name:
            return whole
    return min(total, whole)


def _stored(module: Module, scope: Mapping[str, Instruction], name: str, shape: str) -> int:
    """Bytes that a fused computation writes: the part, where it updates an operand in place."""
    x = scope[name]
    if x.opcode == "tuple":
        parts = dataclasses.replace(x, shape=shape).parts()
        return sum(_stored(module, scope, part, s) for part, s in zip(x.operands, parts, strict=True))
    if x.opcode == "bitcast":
        return _stored(module, scope, x.operands[0], shape)
    if x.opcode == "dynamic-update-slice":
        return min(_size(shape), _size(scope[x.operands[1]].shape, on_chip=True))
    if x.opcode == "fusion":
        inner = x.called("calls")
        return _stored(module, module[inner], module.roots[inner], shape)
    return _size(shape)


def _size(shape: str, on_chip: bool = False) -> int:
    """Bytes of the arrays of a shape; of those placed on the chip only if they are asked for."""
    return sum(array.bytes for array in arrays(shape) if on_chip or not array.on_chip)


# Collectives.


def _collectives(module: Module, scope: Mapping[str, Instruction], x: Instruction) -> Iterable[Collective]:
    if x.opcode == "fusion":
        body = module[x.called("calls")]
        inner = [c for y in body.values() for c in _collectives(module, body, y)]
        if x.called("calls").startswith("%all-reduce-scatter"):
            inner = [dataclasses.replace(c, kind="reduce-scatter") for c in inner]
        return inner
    kind = x.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return []
    group = _group(x.attributes)
    given = sum(_size(scope[name].shape, on_chip=True) for name in x.operands)
    return [Collective(kind, given * (len(group) if kind == "all-gather" else 1), group)]


def _group(attributes: str) -> tuple[int, ...]:
    """The first of the groups of devices, which come in four notations."""
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return tuple(map(int, pair.groups()))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return _integers(listed[1])
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        sizes = _integers(counted[3])
        order = _integers(counted[4]) if counted[4] else range(len(sizes))
        numbers = _strided(sizes, order)
        return tuple(numbers[: int(counted[2])])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        attributes,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
        places = _of_mesh(sizes, re.findall(r"('\w+')(?::\((\d+)\)(\d+))?", mesh[4]))
        if not mesh[2]:
            return places
        held = _integers(mesh[2])
        numbers = _strided(held, _integers(mesh[3]) if mesh[3] else range(len(held)))
        return tuple(numbers[place] for place in places)
    raise ValueError(f"the devices of a collective cannot be read: {attributes[:200]}")


def _strided(sizes: Iterable[int], order: Iterable[int]) -> list[int]:
    """Numbers of an array in row-major order, read after its axes are transposed."""
    sizes = tuple(sizes)
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [number + i * strides[axis] for number in numbers for i in range(sizes[axis])]
    return numbers


def _of_mesh(sizes: Mapping[str, int], taken: Iterable[tuple[str, str, str]]) -> tuple[int, ...]:
    """The group of device 0 along axes of a mesh, or along parts of axes: 'axis':(before)size."""
    names = list(sizes)
    numbers = [0]
    for name, before, part in taken:
        stride = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
        length = int(part) if part else sizes[name]
        if part:
            stride *= sizes[name] // (int(before) * length)
        numbers = [number + i * stride for number in numbers for i in range(length)]
    return tuple(numbers)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
