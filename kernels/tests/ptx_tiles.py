"""Tensor-core instructions for `ptx_machine`: fragments in registers and tiles in shared memory.

See NVIDIA's "PTX ISA 9.0", sections 9.7.14 (mma, ldmatrix) and 9.7.15 (wgmma), for the layouts.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ptx_machine import Machine

LANE = np.arange(32)
# In a fragment a lane holds one row in eight, and two neighboring columns in eight.
ROW, COLUMN = LANE // 4, LANE % 4
# Bytes per row, by the swizzle mode of a matrix descriptor.
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}


def names(vector: str) -> list[str]:
    """Return the registers of a vector, or a single register."""
    return [text.strip() for text in vector.strip("<>").split(",")]


def wide(x: np.ndarray) -> np.ndarray:
    """Convert bfloat16 bits to float32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, ties to even."""
    bits = x.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), nearest >> np.uint32(16)).astype(np.uint16)


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and the high 16 bits."""
    return (x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def narrow(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Join two 16-bit halves."""
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


def tf32(x: np.ndarray) -> np.ndarray:
    """Convert bits to float32, keeping the 19 bits that tensor cores read."""
    return (x & np.uint32(0xFFFFE000)).view(np.float32)


def move_matrices(machine: "Machine", name: str, transposed: bool, operands: list[str]) -> None:
    """Execute ldmatrix or stmatrix: 8 x 8 tiles of 16-bit numbers, with row addresses from the lanes."""
    registers, address = operands if name == "ldmatrix" else operands[::-1]
    where, memory = machine.find(address, 16, "shared", None)
    rows, memory = where.reshape(-1, 32) // 2, memory.view(np.uint16)
    for i, register in enumerate(names(registers)):
        tile = rows[:, 8 * i : 8 * i + 8, None] + np.arange(8)
        tile = tile.swapaxes(1, 2) if transposed else tile
        both = [tile[:, ROW, 2 * COLUMN + j].reshape(-1) for j in (0, 1)]
        if name == "ldmatrix":
            machine.put(register, narrow(*(memory[at] for at in both)))
        else:
            for at, x in zip(both, halves(machine.value(register, np.uint32)), strict=True):
                memory[at] = x


def mma(machine: "Machine", modifiers: list[str], operands: list[str]) -> None:
    """Execute mma: a 16 x 8 product in every warp."""
    is_tf32 = modifiers[-2] == "tf32"
    assert modifiers[-4:] == ["f32", modifiers[-2], modifiers[-2], "f32"]
    a = fragments(machine, operands[1], is_tf32)
    # B's columns have the layout of A's rows.
    b = np.empty((len(a), 8, a.shape[2]), np.float32)
    for i, x in enumerate(machine.value(name, np.uint32).reshape(-1, 32) for name in names(operands[2])):
        scatter(b, ROW, i, x, is_tf32)
    product = a @ b.swapaxes(1, 2)
    for i, (register, c) in enumerate(zip(names(operands[0]), names(operands[3]), strict=True)):
        x = product[:, ROW + 8 * (i // 2), 2 * COLUMN + i % 2].reshape(-1)
        machine.put(register, x + machine.value(c, np.float32))


def fragments(machine: "Machine", registers: str, is_tf32: bool) -> np.ndarray:
    """Return A, [warps, 16, 16 or 8], from its registers."""
    parts = [machine.value(name, np.uint32).reshape(-1, 32) for name in names(registers)]
    tile = np.empty((len(parts[0]), 16, 8 if is_tf32 else 16), np.float32)
    for i, x in enumerate(parts):
        scatter(tile, ROW + 8 * (i % 2), i // 2, x, is_tf32)
    return tile


def scatter(tile: np.ndarray, rows: np.ndarray, half: int, x: np.ndarray, is_tf32: bool) -> None:
    """Write a register to the first or second half of a tile's columns."""
    if is_tf32:
        tile[:, rows, 4 * half + COLUMN] = tf32(x)
    else:
        for j, part in enumerate(halves(x)):
            tile[:, rows, 8 * half + 2 * COLUMN + j] = wide(part)


def wgmma(machine: "Machine", modifiers: list[str], operands: list[str]) -> None:
    """Execute wgmma: a 64 x N product in every warpgroup. B and possibly A are in shared memory."""
    is_tf32 = modifiers[-1] == "tf32"
    assert modifiers[-3:] == ["f32", modifiers[-1], modifiers[-1]]
    n, k = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", modifiers[3]).groups())
    to, a, b, accumulate, sign_a, sign_b, *transposed = operands
    assert (sign_a, sign_b) == ("1", "1")
    if a[0] == "<":
        a = fragments(machine, a, is_tf32).reshape(-1, 64, k)
    else:
        a = described(machine, a, 64, k, is_tf32, transposed[:-1] == ["1"])
    product = a @ described(machine, b, n, k, is_tf32, transposed[-1:] == ["1"]).swapaxes(1, 2)
    adds = machine.value(accumulate, np.bool_)
    warp, lane = np.divmod(np.arange(128), 32)
    for i, register in enumerate(names(to)):
        row, column = 16 * warp + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2
        x = product[:, row, column].reshape(-1)
        machine.put(register, x + np.where(adds, machine.value(register, np.float32), 0) if adds.any() else x)


def described(
    machine: "Machine", register: str, rows: int, k: int, is_tf32: bool, transposed: bool
) -> np.ndarray:
    """Return the tile of a matrix descriptor, [warpgroups, rows, k]; `transposed` has contiguous columns."""
    descriptor = machine.value(register, np.uint64).reshape(-1, 128)
    assert (descriptor == descriptor[:, :1]).all(), "descriptors differ within a warpgroup"
    fields = [descriptor[:, 0, None, None] >> np.uint64(bit) for bit in (0, 16, 32)]
    start, leading, stride = ((field & np.uint64(0x3FFF)).astype(np.int64) * 16 for field in fields)
    mode = int(descriptor[0, 0] >> np.uint64(62))
    width, size = SWIZZLES[mode], 4 if is_tf32 else 2
    i, j = np.arange(rows)[:, None], np.arange(k)
    if not transposed:
        columns = size * j if mode else size * j // 16 * leading + size * j % 16
        offset = i // 8 * stride + i % 8 * width + columns
    elif mode:
        offset = size * i // width * leading + size * i % width + j // 8 * stride + j % 8 * width
    else:
        offset = i // 8 * stride + size * i % 16 + j // 8 * leading + j % 8 * width
    address = start + offset
    if mode:
        # Swizzling permutes the 16-byte columns of rows of 128 bytes.
        address ^= (address >> 7 & width // 16 - 1) << 4
    assert (address + size <= machine.shared_size).all(), "beyond shared memory"
    groups = np.repeat(machine.programs, machine.threads // 128)[:, None, None]
    address += groups * machine.shared_size
    if is_tf32:
        return tf32(machine.shared.view(np.uint32)[address // 4])
    return wide(machine.shared.view(np.uint16)[address // 2])
