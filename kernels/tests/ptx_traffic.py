"""A PTX machine that counts memory transactions, by NVIDIA's rules for a warp."""

import re

import numpy as np
from ptx_machine import WARP, Instruction, Machine

BANKS, SECTOR = 32, 32


class CountingMachine(Machine):
    """Counts the transactions of all threads of all programs.

    wavefronts: shared-memory cycles, each of at most one word per bank.
    least_wavefronts: shared-memory cycles if there were no bank conflicts.
    sectors: 32-byte sectors of global memory that warps access.
    bytes: distinct bytes of global memory that warps access.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.wavefronts = self.least_wavefronts = self.sectors = self.bytes = 0

    def step(self, instruction: Instruction, active: np.ndarray | None) -> None:
        """Execute an instruction, and keep it for `find`."""
        self.instruction = instruction
        super().step(instruction, active)

    def find(
        self, text: str, width: int, space: str, active: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count the transactions of an access."""
        where, memory = super().find(text, width, space, active)
        active = np.ones(self.lanes, bool) if active is None else active
        matrices = re.search(r"matrix.*\.x(\d)", self.instruction.opcode)
        # The lanes of one wavefront access 128 bytes together; eight lanes address a matrix of ldmatrix.
        together = min(WARP, 128 // width) if space == "shared" else WARP
        turns = np.where(active, where, -1).reshape(-1, WARP // together, together)
        for turn in turns[:, : int(matrices.group(1)) if matrices else None].reshape(-1, together):
            touched = np.unique(turn[turn >= 0][:, None] + np.arange(width))
            if space == "global":
                self.sectors += len(np.unique(touched // SECTOR))
                self.bytes += len(touched)
            elif len(touched):
                words = np.unique(touched // 4)
                self.wavefronts += np.bincount(words % BANKS).max()
                self.least_wavefronts += -(-len(words) // BANKS)
        return where, memory
