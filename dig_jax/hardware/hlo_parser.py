"""Parse the text of an optimized HLO module into instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*)")


@dataclasses.dataclass(frozen=True)
class HloArray:
    """One array of a shape.

    bytes: size including the padding of tiles.
    on_chip: whether the compiler placed it in on-chip memory, such as VMEM.
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    on_chip: bool


@functools.cache
def arrays(shape: str) -> tuple[HloArray, ...]:
    """Return the arrays in a shape or in a tuple of shapes."""
    return tuple(_array(*match) for match in _ARRAY.findall(shape))


def find(pattern: str, text: str) -> re.Match[str]:
    """Search for a required pattern.

    Raises:
        ValueError: no match.
    """
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"unsupported HLO: got {text[:200]!r}; expected a match of {pattern}")
    return found


def integers(text: str) -> tuple[int, ...]:
    """Parse integers separated by commas."""
    return tuple(int(number) for number in text.split(",") if number)


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line: name = shape opcode(operands), attributes."""

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
        """Target of a custom call; "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *roles: str) -> str:
        """Return the computation called in one of these roles, such as "body"."""
        return find(rf"\b(?:{'|'.join(roles)})=(%[\w.-]+)", self.attributes)[1]

    def branches(self) -> list[str]:
        """Return the computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return re.findall(r"%[\w.-]+", listed[1] if listed else self.attributes.split(", metadata")[0])

    def element_shapes(self) -> list[str]:
        """Return the shapes of a tuple's elements; [shape] if the result is not a tuple."""
        if not self.shape.startswith("("):
            return [self.shape]
        shapes, depth, start = [], 0, 1
        for position, character in enumerate(self.shape):
            depth += (character in "([{") - (character in ")]}")
            if (character == "," and depth == 1) or depth == 0:
                shapes.append(self.shape[start:position].strip())
                start = position + 1
        return shapes


@dataclasses.dataclass(frozen=True)
class HloModule:
    """The computations of a module by name, as instructions by name.

    entry: name of the entry computation.
    roots: name of each computation's root instruction.
    """

    entry: str
    computations: Mapping[str, Mapping[str, HloInstruction]]
    roots: Mapping[str, str]

    def __getitem__(self, name: str) -> Mapping[str, HloInstruction]:
        return self.computations[name]


def parse(text: str) -> HloModule:
    """Parse the text that `Compiled.as_text()` returns."""
    computations: dict[str, dict[str, HloInstruction]] = {}
    roots: dict[str, str] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            root, result, shape, opcode, rest = match.groups()
            computations[name][result] = HloInstruction(result, shape, opcode, *_split(rest))
            if root:
                roots[name] = result
        elif header := re.match(r"(ENTRY )?(%[\w.-]+) ", line):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
    return HloModule(entry, computations, roots)


def _array(dtype: str, dims: str, layout: str) -> HloArray:
    sizes = integers(dims)
    count = math.prod(_padded(sizes, layout) if sizes and ":T(" in layout else sizes)
    bits = 0 if dtype == "token" else int((re.search(r"\d+", dtype) or ["8"])[0])
    return HloArray(dtype, sizes, -(-count * bits // 8), bool(re.search(r"S\([1-9]", layout)))


def _padded(sizes: tuple[int, ...], layout: str) -> list[int]:
    """Round sizes up to multiples of the tile sizes, in order from the major to the minor dimension."""
    padded = [sizes[axis] for axis in reversed(integers(layout.split(":")[0]))]
    tile = integers(find(r"T\(([\d,]+)\)", layout)[1])
    for axis, size in zip(range(-len(tile), 0), tile, strict=True):
        if -axis <= len(padded):
            padded[axis] = -(-padded[axis] // size) * size
    return padded


def _split(rest: str) -> tuple[str, str]:
    """Split the text after an opcode's parenthesis into operands and attributes."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""
