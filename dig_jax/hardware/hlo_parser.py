"""The text of an optimised HLO module, read into instructions."""

import dataclasses
import functools
import re
from collections.abc import Mapping

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a shape: bytes with the padding of its layout's tiles, and whether it lies on the chip."""

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    on_chip: bool


@functools.cache
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape or of a tuple of shapes."""
    return tuple(_array(*match) for match in _ARRAY.findall(shape))


def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(size) for size in dims.split(",") if size)
    padded = list(sizes)
    if sizes and ":T(" in layout:
        order = [int(axis) for axis in layout.split(":")[0].split(",")]
        padded = [sizes[axis] for axis in reversed(order)]
        tile = [int(size) for size in re.search(r"T\(([\d,]+)\)", layout)[1].split(",")]
        for axis, size in zip(range(-len(tile), 0), tile, strict=True):
            if -axis <= len(padded):
                padded[axis] = -(-padded[axis] // size) * size
    bits = 0 if dtype == "token" else int((re.search(r"\d+", dtype) or ["8"])[0])
    count = 1
    for size in padded:
        count *= size
    return Array(dtype, sizes, -(-count * bits // 8), bool(re.search(r"S\([1-9]", layout)))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name = shape opcode(operands), attributes."""

    name: str
    shape: str
    opcode: str
    operands_text: str
    attributes: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(re.findall(r"%[\w.-]+", self.operands_text))

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call, what it calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *roles: str) -> str:
        """The computation that it runs in one of these roles, such as a loop's body."""
        return re.search(rf"\b(?:{'|'.join(roles)})=(%[\w.-]+)", self.attributes)[1]

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return re.findall(r"%[\w.-]+", listed[1] if listed else self.attributes.split(", metadata")[0])

    def parts(self) -> list[str]:
        """The shapes of a tuple's parts; the shape itself where it is none."""
        if not self.shape.startswith("("):
            return [self.shape]
        parts, depth, start = [], 0, 1
        for place, character in enumerate(self.shape):
            depth += (character in "([{") - (character in ")]}")
            if (character == "," and depth == 1) or depth == 0:
                parts.append(self.shape[start:place].strip())
                start = place + 1
        return parts


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each of them instructions by name; the entry, and each one's root."""

    entry: str
    computations: Mapping[str, Mapping[str, Instruction]]
    roots: Mapping[str, str]

    def __getitem__(self, name: str) -> Mapping[str, Instruction]:
        return self.computations[name]


def parse(text: str) -> Module:
    """Reads a module, as `Compiled.as_text()` gives it."""
    computations, roots, entry, name = {}, {}, "", ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            root, result, shape, opcode, rest = match.groups()
            computations[name][result] = Instruction(result, shape, opcode, *_split(rest))
            if root:
                roots[name] = result
        elif header := re.match(r"(ENTRY )?(%[\w.-]+) ", line):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
    return Module(entry, computations, roots)


def _split(rest: str) -> tuple[str, str]:
    """The operands, up to the parenthesis that closes them, and the attributes."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""
