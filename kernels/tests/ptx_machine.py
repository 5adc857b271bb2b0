"""Runs PTX in NumPy: executes the code that Triton generates, instruction by instruction, without a GPU.

All threads of all programs execute an instruction together. Programs may branch differently and then run
separately; the threads of one program may not. Every memory access must be aligned and inside a buffer.
Barriers and fences do nothing, because all threads run in lockstep, so the machine does not find races. An
asynchronous copy takes effect when its program waits for it. See NVIDIA's "PTX ISA 9.0", section 9.7, for the
instructions. `ptx_tiles` has the tensor-core instructions.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import ptx_tiles
from ptx_tiles import bfloat16, names, narrow, wide

WARP = 32
TYPES = {
    "b8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "f16": np.float16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "f32": np.float32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "pred": np.bool_,
}
ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "max": np.fmax,
    "min": np.fmin,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "mad": lambda x, y, z: x * y + z,
    "fma": lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32),
}
COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": lambda x, y: (x < y) | (x > y),
    # Unordered: true for NaN, unlike the others.
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
# Instructions that synchronize threads, which run in lockstep here.
ORDER = ("bar", "fence", "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group", "griddepcontrol")
# The start of the first buffer, and the least space between two buffers.
GAP = 4096


class Instruction(NamedTuple):
    """`@predicate name.modifiers operands`."""

    predicate: str | None
    opcode: str
    operands: list[str]


def parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of a kernel, and the index of the instruction after each label."""
    code, labels = [], {}
    for text in _statements(ptx):
        if text.startswith("$"):
            labels[text.removesuffix(":")] = len(code)
            continue
        predicate, opcode, operands = re.fullmatch(r"(?:@(!?%\w+) )?([\w.:]+)(?: (.*))?", text).groups()
        # An operand is a vector, an address or a word.
        code.append(Instruction(predicate, opcode, re.findall(r"<[^>]*>|\[[^\]]*\]|[^,\s]+", operands or "")))
    return code, labels


def _statements(ptx: str) -> Iterator[str]:
    body = re.sub(r"//.*", "", ptx[ptx.index("{", ptx.index(".entry")) :])
    # Remove braces around statements, and replace braces around vectors by <>.
    body = re.sub(r"\{(\s*[%\w][^{};]*)\}", r"<\1>", body)
    body = re.sub(r"(\$\w+:)", r";\1;", body.replace("{", ";").replace("}", ";"))
    for text in body.split(";"):
        text = " ".join(text.split())
        if text and not text.startswith("."):
            yield text


def flush(x: np.ndarray) -> np.ndarray:
    """Replace numbers below 2**-126 by zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


class Machine:
    """A GPU for one kernel. Each program has `threads` threads and `shared` bytes of shared memory."""

    def __init__(self, ptx: str, threads: int, shared: int):
        self.code, self.labels = parse(ptx)
        self.parameters = re.findall(r"\.param [^\n]*?(\w+_param_\d+)", ptx[: ptx.index("{")])
        self.threads, self.shared_size = threads, shared

    def run(self, arrays: list[np.ndarray], programs: int) -> None:
        """Run all programs in place on contiguous arrays, one per parameter."""
        starts, end = [], GAP
        for x in arrays:
            starts.append(end)
            end += -(-x.nbytes // GAP) * GAP + GAP
        self.starts = dict(zip(self.parameters, starts, strict=True))
        self.memory, self.inside = np.zeros(end, np.uint8), np.zeros(end, bool)
        for start, x in zip(starts, arrays, strict=True):
            self.memory[start : start + x.nbytes] = x.reshape(-1).view(np.uint8)
            self.inside[start : start + x.nbytes] = True
        # Shared memory holds NaNs until it is written.
        self.shared = np.full(programs * self.shared_size, 0xFF, np.uint8)
        groups = [(0, np.arange(programs), {}, [[]])]
        with np.errstate(all="ignore"):
            while groups:
                groups += self._run_group(*groups.pop())
        for start, x in zip(starts, arrays, strict=True):
            x.reshape(-1).view(np.uint8)[:] = self.memory[start : start + x.nbytes]

    def _run_group(
        self, at: int, programs: np.ndarray, registers: dict, copies: list[list[tuple]]
    ) -> list[tuple]:
        """Run programs from an instruction until they end or branch differently.

        Args:
            copies: pending groups of asynchronous copies, the open one last; a copy is the bytes of every
                thread, their offsets in shared memory, and which threads copy.
        """
        self.programs, self.registers, self.copies = programs, registers, copies
        self.lanes = len(programs) * self.threads
        while True:
            instruction = self.code[at]
            at += 1
            active = self._active(instruction.predicate)
            if instruction.opcode == "ret":
                assert active is None, "some threads of a program end before others"
                return []
            if not instruction.opcode.startswith("bra"):
                try:
                    self.step(instruction, active)
                except Exception as error:
                    error.add_note(f"at {instruction}")
                    raise
                continue
            target = self.labels[instruction.operands[-1]]
            jumps = np.ones(self.lanes, bool) if active is None else active
            jumps = jumps.reshape(-1, self.threads)
            assert (jumps == jumps[:, :1]).all(), "threads of a program branch differently"
            jumps = jumps[:, 0]
            if jumps.all():
                at = target
            elif jumps.any():
                return [
                    (where, *self._part(np.repeat(part, self.threads), part))
                    for where, part in ((target, jumps), (at, ~jumps))
                ]

    def _part(self, threads: np.ndarray, programs: np.ndarray) -> tuple:
        """Return the state of some of the running programs."""
        registers = {name: x[threads] for name, x in self.registers.items()}
        copies = [[tuple(x[threads] for x in copy) for copy in group] for group in self.copies]
        return self.programs[programs], registers, copies

    def _active(self, predicate: str | None) -> np.ndarray | None:
        if predicate is None:
            return None
        active = self.registers[predicate.lstrip("!")]
        return ~active if predicate[0] == "!" else active

    def value(self, text: str, dtype: type) -> np.ndarray:
        """Return the value of a register or constant in every thread."""
        if text in ("%tid.x", "%ctaid.x"):
            thread, program = np.arange(self.threads), self.programs[:, None]
            x = thread + 0 * program if text == "%tid.x" else program + 0 * thread
            return x.astype(np.uint32).reshape(-1).view(dtype)
        if text in self.registers:
            return self.registers[text].view(dtype)
        if text == "global_smem":
            x = np.zeros((), dtype)
        elif text.startswith("0f"):
            x = np.uint32(int(text[2:], 16)).view(dtype)
        elif dtype == np.bool_:
            x = np.bool_(int(text))
        else:
            bits = 8 * np.dtype(dtype).itemsize
            x = np.dtype(f"u{bits // 8}").type(int(text.rstrip("U"), 0) % 2**bits).view(dtype)
        return np.broadcast_to(x, (self.lanes,))

    def put(self, register: str, x: np.ndarray, active: np.ndarray | None = None) -> None:
        """Write a register in the active threads."""
        if x.dtype != np.bool_:
            x = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
        if active is not None:
            x = np.where(active, x, self.registers.get(register, np.zeros_like(x)))
        self.registers[register] = x

    def find(
        self, text: str, width: int, space: str, active: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the byte offsets of an access of `width` bytes in every thread, and the memory it is in."""
        base, _, offset = text.strip("[] ").replace(" ", "").partition("+")
        short = base in self.registers and self.registers[base].dtype == np.uint32
        address = self.value(base, np.uint32 if short else np.uint64).astype(np.int64) + int(offset or 0)
        address = address if active is None else np.where(active, address, GAP if space == "global" else 0)
        assert (address % width == 0).all(), "an address is not aligned"
        if space == "global":
            assert self.inside[address].all(), "an access begins outside the buffers"
            assert self.inside[address + width - 1].all(), "an access ends outside the buffers"
            return address, self.memory
        assert (address >= 0).all() and (address + width <= self.shared_size).all(), "beyond shared memory"
        return address + np.repeat(self.programs, self.threads) * self.shared_size, self.shared

    def step(self, instruction: Instruction, active: np.ndarray | None) -> None:
        """Execute an instruction other than a branch."""
        _, opcode, operands = instruction
        name, *modifiers = opcode.split(".")
        dtype = TYPES.get(modifiers[-1]) if modifiers else None
        if opcode.startswith(ORDER):
            return
        if name in ("ldmatrix", "stmatrix"):
            ptx_tiles.move_matrices(self, name, "trans" in modifiers, operands)
        elif name == "mma":
            ptx_tiles.mma(self, modifiers, operands)
        elif name == "wgmma":
            ptx_tiles.wgmma(self, modifiers, operands)
        elif opcode.startswith("cp.async"):
            self._copy_async(modifiers[1], operands, active)
        elif name in ("ld", "st"):
            self._load_or_store(name, modifiers, operands, active)
        elif name == "mov" and "<" in "".join(operands):
            self._pack(operands, dtype, active)
        elif name == "shfl":
            self._shuffle(modifiers[1], operands)
        else:
            self.put(operands[0], self._computed(name, modifiers, dtype, operands[1:]), active)

    def _computed(self, name: str, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        if special := getattr(self, f"_{name}", None):
            return special(modifiers, dtype, operands)
        values = [self.value(t, dtype) for t in operands]
        if modifiers[0] in ("wide", "hi"):
            product = np.multiply(*(x.astype(np.int64 if dtype == np.int32 else np.uint64) for x in values))
            return product if modifiers[0] == "wide" else (product >> product.dtype.type(32)).astype(dtype)
        if name in ("max", "min") and dtype != np.float32:
            return (np.maximum if name == "max" else np.minimum)(*values)
        if "ftz" in modifiers:
            return flush(ARITHMETIC[name](*map(flush, values)))
        return ARITHMETIC[name](*values)

    def _mov(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        return self.value(operands[0], dtype)

    _cvta = _mov

    def _selp(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        x, y = (self.value(t, dtype) for t in operands[:2])
        return np.where(self.value(operands[2], np.bool_), x, y)

    def _shl(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        x, count = self._shifted(dtype, operands)
        return x << count

    def _shr(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        x, count = self._shifted(dtype, operands)
        return x >> count

    def _shifted(self, dtype: type, operands: list[str]) -> tuple[np.ndarray, np.ndarray]:
        x, count = self.value(operands[0], dtype), self.value(operands[1], np.uint32)
        assert (count < 8 * x.dtype.itemsize).all()
        return x, count.astype(x.dtype)

    def _bfe(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        start, count = (int(t) for t in operands[1:])
        return self.value(operands[0], dtype) << dtype(32 - start - count) >> dtype(32 - count)

    def _setp(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        if modifiers[-1] == "bf16":
            return COMPARISONS[modifiers[0]](*(wide(self.value(t, np.uint16)) for t in operands))
        return COMPARISONS[modifiers[0]](*(self.value(t, dtype) for t in operands))

    def _cvt(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        to, source = modifiers[-2:]
        if to in ("bf16x2", "f16x2"):
            high, low = (self.value(t, np.float32) for t in operands)
            as_16_bits = bfloat16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            return narrow(as_16_bits(low), as_16_bits(high))
        if to == "bf16":
            return bfloat16(self.value(operands[0], np.float32))
        if source == "bf16":
            return wide(self.value(operands[0], np.uint16))
        if "tf32" in modifiers:  # to the nearest, halves away from zero
            return (self.value(operands[0], np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        x = self.value(operands[0], TYPES[source])
        assert x.dtype.kind != "f" or np.dtype(TYPES[to]).kind == "f", "float to integer is not implemented"
        return x.astype(TYPES[to])

    def _prmt(self, modifiers: list[str], dtype: type, operands: list[str]) -> np.ndarray:
        low, high, select = (self.value(t, np.uint32) for t in operands)
        pool = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        result = np.zeros(self.lanes, np.uint32)
        for i in range(4):
            selector = select >> np.uint32(4 * i) & np.uint32(15)
            byte = pool >> (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(selector & np.uint32(8), sign, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    def _pack(self, operands: list[str], dtype: type, active: np.ndarray | None) -> None:
        """Move a register to a pair of registers of half the width, or back."""
        to, source = operands
        half = np.dtype(f"u{np.dtype(dtype).itemsize // 2}")
        if to[0] == "<":
            both = self.value(source, dtype).copy().view(half).reshape(-1, 2)
            for register, x in zip(names(to), both.T, strict=True):
                if register != "_":
                    self.put(register, x, active)
        else:
            both = np.stack([self.value(t, half.type) for t in names(source)], axis=1)
            self.put(to, both.reshape(-1).view(dtype), active)

    def _load_or_store(
        self, name: str, modifiers: list[str], operands: list[str], active: np.ndarray | None
    ) -> None:
        space = modifiers[0].split("::")[0]
        if space == "param":
            self.put(operands[0], np.full(self.lanes, self.starts[operands[1].strip("[]")], np.uint64))
            return
        registers, address = operands if name == "ld" else operands[::-1]
        registers, dtype = names(registers), TYPES[modifiers[-1]]
        size = np.dtype(dtype).itemsize
        where, memory = self.find(address, size * len(registers), space, active)
        memory = memory.view(f"u{size}")
        for i, register in enumerate(registers):
            if name == "ld":
                x = memory[where // size + i]
                self.put(register, x.astype(np.uint16) if size == 1 else x, active)
            else:
                x, at = self.value(register, memory.dtype.type), where // size + i
                x = x.reshape(self.lanes, -1)[:, 0]  # the low bits of a wider register
                memory[at if active is None else at[active]] = x if active is None else x[active]

    def _copy_async(self, kind: str, operands: list[str], active: np.ndarray | None) -> None:
        if kind == "commit_group":
            self.copies.append([])
        elif kind == "wait_group":
            last = max(len(self.copies) - 1 - int(operands[0]), 0)
            for x, where, active in (copy for group in self.copies[:last] for copy in group):
                self.shared[where[active]] = x[active]
            del self.copies[:last]
        else:
            size = int(operands[2], 0)
            # The rest of the bytes are zeros.
            copied = self.value(operands[3], np.uint32) if len(operands) > 3 else np.full(self.lanes, size)
            assert np.isin(copied, (0, size)).all(), "a partial asynchronous copy is not implemented"
            active = np.ones(self.lanes, bool) if active is None else active
            where, _ = self.find(operands[0], size, "shared", active)
            source, _ = self.find(operands[1], size, "global", active & (copied > 0))
            x = self.memory[source[:, None] + np.arange(size)]
            x = np.where((copied > 0)[:, None], x, 0).astype(np.uint8)
            self.copies[-1].append((x, where[:, None] + np.arange(size), active))

    def _shuffle(self, mode: str, operands: list[str]) -> None:
        x, step = (self.value(t, np.uint32).reshape(-1, WARP) for t in operands[1:3])
        lane, step = np.arange(WARP), step.astype(np.int64)
        assert int(operands[3]) == (0 if mode == "up" else 31), (
            "shuffles within part of a warp are not implemented"
        )
        source = {"bfly": lane ^ step, "idx": step + 0 * lane, "up": np.where(lane < step, lane, lane - step)}
        self.put(operands[0], np.take_along_axis(x, source[mode], axis=1).reshape(-1))
