"""Count the work of one device in an optimized HLO module: FLOPs, memory traffic and collectives.

FLOPs include matrix products, convolutions, and TPU kernels by their `pl.CostEstimate` (GPU programs do not
contain it). Memory traffic excludes arrays that the compiler placed on the chip. Elementwise operations count
as memory traffic only.

`Compiled.cost_analysis` differs: it counts a loop's body once and on-chip arrays as memory traffic, does not
separate FLOPs by operand type, and is empty for GPUs that are not present. docs/guide/plan.md compares
figures.
"""

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping

from dig_jax.hardware.hlo_collectives import Collective, collectives
from dig_jax.hardware.hlo_parser import HloInstruction, HloModule, arrays, find, integers, parse

# Opcodes that move no data.
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
_FUSIONS = ("fusion", "fusion-start")
_Scope = Mapping[str, HloInstruction]


@dataclasses.dataclass
class Counts:
    """Totals per device and execution: FLOPs by operand type (see `Chip.flops`), bytes, collectives."""

    flops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes: int = 0
    collectives: list[Collective] = dataclasses.field(default_factory=list)

    def add(self, other: "Counts", times: int = 1) -> None:
        """Add the counts of something that runs `times` times."""
        for kind, flops in other.flops.items():
            self.flops[kind] += flops * times
        self.bytes += other.bytes * times
        self.collectives += [dataclasses.replace(c, bytes=c.bytes * times) for c in other.collectives]

    def exchanged(self) -> dict[str, int]:
        """Return the bytes of the collectives by kind."""
        total = collections.Counter()
        for collective in self.collectives:
            total[collective.kind] += collective.bytes
        return dict(total)


def count(text: str) -> Counts:
    """Count an optimized module, given the text that `Compiled.as_text()` returns.

    Raises:
        ValueError: unsupported HLO, such as a loop without a known trip count.
    """
    module = parse(text)
    return _computation(module, module.entry)


def _computation(module: HloModule, name: str) -> Counts:
    """Count a computation that is executed, not fused."""
    counts = Counts()
    for instruction in module[name].values():
        opcode = instruction.opcode
        if opcode == "while":
            body = _computation(module, instruction.called("body"))
            counts.add(body, _trip_count(module, instruction))
        elif opcode == "conditional":
            branches = [_computation(module, branch) for branch in instruction.branches()]
            counts.add(max(branches, key=lambda branch: branch.bytes))
        elif opcode in ("call", _ASYNC_CALL):
            counts.add(_computation(module, instruction.called("to_apply", "calls")))
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):  # counted at "-start"
            counts.flops.update(_flops(module, module[name], instruction))
            counts.bytes += _bytes(module, module[name], instruction)
            counts.collectives += collectives(module, module[name], instruction)
    return counts


def _trip_count(module: HloModule, loop: HloInstruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    # The loop of `lax.scan` counts up to a constant.
    condition = module[loop.called("condition")].values()
    bounds = [re.match(r"\d+", x.operands_text) for x in condition if x.opcode == "constant"]
    if not any(bounds):
        raise ValueError(f"unknown trip count of loop {loop.name}")
    return max(int(bound[0]) for bound in bounds if bound)


# FLOPs.


def _flops(module: HloModule, scope: _Scope, x: HloInstruction) -> collections.Counter[str]:
    flops = collections.Counter()
    if x.opcode in _FUSIONS:
        body = module[x.called("calls")]
        for inner in body.values():
            flops.update(_flops(module, body, inner))
    elif x.opcode == "dot":
        contracted = integers(find(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)[1])
        flops[_operand_type(scope, x)] += _product(scope, x, contracted)
    elif x.opcode == "convolution" or x.target.startswith("__cudnn$conv"):
        flops[_operand_type(scope, x)] += _convolution(scope, x)
    elif x.target.startswith("__cublas"):
        quoted = find(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)[1]
        flops[_operand_type(scope, x)] += _product(scope, x, integers(quoted.replace('"', "")))
    elif estimate := _kernel_estimate(x):
        flops["bfloat16"] += int(estimate["flops"])
    elif splash := re.match(r"%splash_mha_(fwd|dq|dkv)_", x.name):
        flops.update(_splash_attention(scope, x, _SPLASH_PRODUCTS[splash[1]]))
    return flops


# Matrix products of a pass of JAX's attention for TPUs, which has no estimate.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def _splash_attention(scope: _Scope, x: HloInstruction, products: int) -> dict[str, int]:
    """Count products of queries [..., t, k] and keys [..., s, k]; the operands before them are masks."""
    shapes = [array for name in x.operands for array in arrays(scope[name].shape)]
    queries, keys = [array for array in shapes if array.dtype in ("bf16", "f16", "f32")][:2]
    kind = "float32" if queries.dtype == "f32" else "bfloat16"
    return {kind: products * 2 * math.prod(queries.dims) * keys.dims[-2]}


def _operand_type(scope: _Scope, x: HloInstruction) -> str:
    types = {array.dtype for name in x.operands[:2] for array in arrays(scope[name].shape)}
    if types & {"f32", "f64"}:
        # Upper case in the options of cuBLAS calls.
        return "highest" if "highest" in x.attributes.lower() else "float32"
    return "bfloat16"


def _dims(scope: _Scope, name: str) -> tuple[int, ...]:
    return arrays(scope[name].shape)[0].dims


def _product(scope: _Scope, x: HloInstruction, contracted: tuple[int, ...]) -> int:
    left = _dims(scope, x.operands[0])
    return 2 * math.prod(arrays(x.shape)[0].dims) * math.prod(left[axis] for axis in contracted)


def _convolution(scope: _Scope, x: HloInstruction) -> int:
    """Count multiply-adds outside of the padding. TPUs express batched products by padded convolutions."""
    left, right, out = find(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes).groups()
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
        total *= _valid_pairs(
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
def _valid_pairs(
    size: int, kernel: int, out: int, before: int, stride: int, spread: int, dilation: int
) -> int:
    """Count pairs of an output and a kernel position along an axis that meet an input, not padding."""
    positions = (o * stride - before + k * dilation for o in range(out) for k in range(kernel))
    return sum(0 <= position <= (size - 1) * spread and position % spread == 0 for position in positions)


def _kernel_estimate(x: HloInstruction) -> dict[str, str] | None:
    """Return a TPU kernel's `pl.CostEstimate`."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', x.attributes)
    return json.loads(found[1]) if found else None


# Memory traffic.


def _bytes(module: HloModule, scope: _Scope, x: HloInstruction) -> int:
    if x.opcode in _FUSIONS:
        return _fusion(module, scope, x)
    if x.opcode == "custom-call":
        return _custom_call(scope, x)
    return _TRAFFIC.get(x.opcode, _operands_and_result)(scope, x)


def _operands_and_result(scope: _Scope, x: HloInstruction) -> int:
    return _size(x.shape) + sum(_read(scope, x))


def _slice(scope: _Scope, x: HloInstruction) -> int:
    return _size(x.shape) + min(_size(x.shape, on_chip=True), _read(scope, x)[0])


def _slice_start(scope: _Scope, x: HloInstruction) -> int:
    sliced = x.element_shapes()[1]
    return _size(sliced) + min(_size(sliced, on_chip=True), _read(scope, x)[0])


def _copy_start(scope: _Scope, x: HloInstruction) -> int:
    return sum(_size(shape) for shape in x.element_shapes()[:2])


def _update(scope: _Scope, x: HloInstruction) -> int:
    return 2 * _read(scope, x)[1]


def _scatter(scope: _Scope, x: HloInstruction) -> int:
    return 3 * _read(scope, x)[-1]


_TRAFFIC: dict[str, Callable[[_Scope, HloInstruction], int]] = {
    "slice": _slice,
    "dynamic-slice": _slice,
    "gather": _slice,
    "dynamic-update-slice": _update,
    "scatter": _scatter,
    "copy-start": _copy_start,
    "slice-start": _slice_start,
}


def _custom_call(scope: _Scope, x: HloInstruction) -> int:
    if x.target in _FREE_CALLS:
        return 0
    if estimate := _kernel_estimate(x):
        # The kernel's estimate includes arrays that the compiler placed on the chip.
        everything = sum(_size(scope[name].shape, on_chip=True) for name in x.operands)
        everything += _size(x.shape, on_chip=True)
        return max(int(estimate["bytes_accessed"]) - everything + _operands_and_result(scope, x), 0)
    # Further results of cuBLAS and cuDNN calls are scratch memory.
    result = x.element_shapes()[0] if x.target.startswith("__cu") else x.shape
    return _size(result) + sum(_read(scope, x))


def _fusion(module: HloModule, scope: _Scope, x: HloInstruction) -> int:
    name, read = x.called("calls"), _read(scope, x)
    body = module[name]
    parameters = {int(y.operands_text): y for y in body.values() if y.opcode == "parameter"}
    total = sum(_read_by_users(module, body, y, read[position]) for position, y in parameters.items())
    # An asynchronous fusion returns its operands, its result and a context.
    shape = x.shape if x.opcode == "fusion" else x.element_shapes()[1]
    return total + _written(module, body, module.roots[name], shape)


def _read_by_users(module: HloModule, scope: _Scope, x: HloInstruction, size: int) -> int:
    """Return the bytes of an operand that a fused computation reads, at most `size`."""
    total = 0
    for user in scope.values():
        if x.name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == x.name:
            total += _size(user.shape, on_chip=True)
        elif user.opcode == "bitcast":
            total += _read_by_users(module, scope, user, size)
        elif user.opcode == "fusion":
            inner = module[user.called("calls")]
            total += sum(
                _read_by_users(module, inner, y, size)
                for y in inner.values()
                if y.opcode == "parameter" and user.operands[int(y.operands_text)] == x.name
            )
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != x.name:
            return size
    return min(total, size)


def _written(module: HloModule, scope: _Scope, name: str, shape: str) -> int:
    """Return the bytes that a fused computation writes; an update in place writes only its slice."""
    x = scope[name]
    if x.opcode == "tuple":
        shapes = dataclasses.replace(x, shape=shape).element_shapes()
        return sum(_written(module, scope, y, s) for y, s in zip(x.operands, shapes, strict=True))
    if x.opcode == "bitcast":
        return _written(module, scope, x.operands[0], shape)
    if x.opcode == "dynamic-update-slice":
        return min(_size(shape), _size(scope[x.operands[1]].shape, on_chip=True))
    if x.opcode == "fusion":
        inner = x.called("calls")
        return _written(module, module[inner], module.roots[inner], shape)
    return _size(shape)


def _read(scope: _Scope, x: HloInstruction) -> list[int]:
    return [_size(scope[name].shape) for name in x.operands if name in scope]


def _size(shape: str, on_chip: bool = False) -> int:
    """Return the bytes of a shape's arrays; `on_chip` includes arrays placed on the chip."""
    return sum(array.bytes for array in arrays(shape) if on_chip or not array.on_chip)
