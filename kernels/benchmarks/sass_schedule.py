"""Estimates the cycles of a loop of a GPU kernel from its machine code.

The compiler writes into each instruction how long the warp waits after it, and for which results of loads,
special functions and products. The model follows one of four equal warps, alone on its core, with rough
latencies. `README.md` compares it with times on an H200.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

# Cycles from issue to result. Instructions that are not here take what the compiler wrote.
LATENCY = {"LDSM": 33, "LDS": 28, "STSM": 20, "STS": 12, "LDG": 600, "STG": 12, "LDGSTS": 10, "LDC": 30}
LATENCY |= {"SHFL": 24, "MUFU": 22, "BAR": 25, "MEMBAR": 20, "FENCE": 20, "ULDC": 20, "R2UR": 15, "S2R": 25}
WARPS = 4
# Cycles between two special functions of a warp, from the issue of an asynchronous copy to its data, and from
# issue to start and from end to result of a matrix product.
SPECIAL, COPY, BEFORE_PRODUCT, AFTER_PRODUCT = 8, 900, 10, 30
BARRIERS = 6


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction: its text, and the 64 bits of its code that hold the schedule."""

    text: str
    bits: int

    @property
    def name(self) -> str:
        """The operation, without predicate and modifiers."""
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split()[0].split(".")[0]

    @property
    def stall(self) -> int:
        """Cycles until the next instruction of the warp."""
        return max(self.bits >> 41 & 15, 1)

    @property
    def awaited(self) -> list[int]:
        """The barriers that the instruction waits for."""
        return [i for i in range(BARRIERS) if self.bits >> 52 >> i & 1]

    @property
    def barriers(self) -> tuple[int, int]:
        """The barriers that its result and the end of its reads release; 7 is none."""
        return self.bits >> 46 & 7, self.bits >> 49 & 7


@dataclasses.dataclass
class _Warp:
    """When the units and results that a warp waits for are free."""

    time: float = 0
    product: float = 0
    special: float = 0
    shared: float = 0
    barriers: list[float] = dataclasses.field(default_factory=lambda: [0.0] * BARRIERS)
    copies: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    groups: list[float] = dataclasses.field(default_factory=list)

    def run(self, instruction: Instruction) -> None:
        """Issue an instruction when it may start."""
        name, text = instruction.name, instruction.text
        self.time = max(self.time, *(self.barriers[i] for i in instruction.awaited), 0)
        if text.startswith("DEPBAR.LE SB0"):
            pending = int(re.search(r"SB0, (0x\w+)", text).group(1), 16)
            self.time = max(self.time, *self.groups[: len(self.groups) - pending], 0)
        elif name == "WARPGROUP" and "DEPBAR" in text:
            self.time = max(self.time, self.product + AFTER_PRODUCT)
        done = self.time + LATENCY.get(name, 0)
        if name == "HGMMA":
            columns = int(re.search(r"64x(\d+)x", text).group(1))
            self.product = max(self.time + BEFORE_PRODUCT, self.product) + max(columns / 2, 16)
        elif name in ("LDSM", "STSM", "STS", "LDS") and not text.startswith("@!PT"):
            start = max(self.time, self.shared)
            self.shared = start + WARPS * (4 if ".4" in text or "128" in text else 1)
            done = self.shared + LATENCY[name]
        elif name == "MUFU":
            start = max(self.time, self.special)
            self.special, done = start + SPECIAL, start + LATENCY[name]
            self.time = max(self.time, start - 2 * SPECIAL)  # a queue of two
        elif name == "LDGSTS":
            self.copies.append(self.time + COPY)
        elif name == "LDGDEPBAR":
            self.groups.append(max(self.copies))
        elif name == "BAR":
            self.time = done
        for barrier, end in zip(instruction.barriers, (done, self.time + 10), strict=True):
            if barrier < BARRIERS:
                self.barriers[barrier] = max(self.barriers[barrier], end)
        self.time += instruction.stall


def cycles(loop: Sequence[Instruction], iterations: int = 6) -> int:
    """Return the cycles of the last of some iterations of a loop."""
    warp, start = _Warp(), 0.0
    for _ in range(iterations):
        start = warp.time
        for instruction in loop:
            warp.run(instruction)
    return round(warp.time - start)


def instructions(sass: str) -> Iterable[str | Instruction]:
    """Yield labels and instructions of the output of `nvdisasm -c -hex`."""
    pattern = r"^(\.L_\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s+/\* 0x\w+ \*/\n\s+/\* 0x(\w+) \*/"
    for label, text, bits in re.findall(pattern, sass, re.MULTILINE):
        yield label or Instruction(text, int(bits, 16))
