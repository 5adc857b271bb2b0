"""Tuning parameters of the Triton kernels, by device kind."""

import dataclasses

# The registers of a core, of every GPU since Volta.
REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class GpuTuning:
    """Tuning parameters for one kind of GPU.

    cores: number of streaming multiprocessors. If there are fewer programs (batch * heads) than two per core,
        a long scan is split along T.
    warps: Triton's `num_warps`.
    stages: Triton's `num_stages`, each with the largest padded state of 16-bit numbers that takes it; others
        take one. With n stages, the tiles of the next n - 1 chunks are copied to shared memory while a chunk
        runs. They should leave room for a third program of a core in the forward pass, a second backward.
    large_warps: replaces `warps` if a padded state has more than `large_state` entries.
    shared_operands: whether products read operands from shared memory, as wgmma of sm_90. Then kernels of
        small states limit their registers, so that more programs share a core, and store each operand once.
    float32_values: the most values of a head that one launch of the float32 backward kernel takes. Before
        sm_90 the operands of its products are in registers, and 64 values spill 106 KB, 32 values 14 KB.
    least_chunks: the fewest chunks in a part of a split scan, because splitting costs a second pass.
    least_parts: the fewest parts of a scan with at least one program per core; fewer save less than the
        second pass costs (an H200 at 144 programs of 64 chunks: 3 parts are slower than 1, and 8 are faster).
    ungate_chunks: the chunks per program in the launch that computes the gradient of o in a gated scan, which
        needs no order. More would leave cores of a large GPU idle at 256 tokens.
    """

    cores: int
    warps: int = 4
    large_warps: int = 8
    stages: tuple[tuple[int, int], ...] = ((3, 32 * 64), (2, 64 * 128))
    large_state: int = 64 * 64
    shared_operands: bool = False
    float32_values: int = 32
    least_chunks: int = 8
    least_parts: int = 8
    ungate_chunks: int = 4

    def part_chunks(self, programs: int, chunks: int) -> int:
        """Return the chunks per part, fewer than `chunks` if a scan of so many is split along T."""
        parts = min(max(2 * self.cores // programs, self.least_parts), chunks // self.least_chunks)
        least = self.least_parts if programs >= self.cores else 3
        if programs >= 2 * self.cores or parts < least:
            return chunks
        return -(-chunks // parts)

    def num_warps(self, state_size: int) -> int:
        """Return `num_warps` for a padded state of `state_size` entries."""
        return self.large_warps if state_size > self.large_state else self.warps

    def num_stages(self, state_size: int, itemsize: int) -> int:
        """Return `num_stages` for a padded state of `state_size` entries of `itemsize` bytes."""
        return next((n for n, largest in self.stages if itemsize == 2 and state_size <= largest), 1)

    def registers(self, programs: int, state_size: int, itemsize: int) -> int | None:
        """Return the most registers of a thread with which so many programs share a core, or None."""
        count = REGISTERS // (programs * 32 * self.warps) // 8 * 8
        small = self.shared_operands and itemsize == 2 and state_size <= 32 * 64
        return count if small and count < 255 else None


# By prefix of `jax.Device.device_kind`.
GPUS = {
    "NVIDIA A100": GpuTuning(cores=108, stages=((2, 64 * 128),)),
    "NVIDIA H100": GpuTuning(cores=132, shared_operands=True, float32_values=128),
    "NVIDIA H200": GpuTuning(cores=132, shared_operands=True, float32_values=128),
    "NVIDIA B200": GpuTuning(cores=148, float32_values=128),
}
# The smallest shared memory of a GPU since Ampere is 99 KB.
DEFAULT_GPU = dataclasses.replace(
    GPUS["NVIDIA H200"], stages=((2, 32 * 64),), shared_operands=False, float32_values=32
)


def gpu(device_kind: str | None) -> GpuTuning:
    """Return the parameters for a device kind, or the default for an unknown one."""
    return next((x for name, x in GPUS.items() if (device_kind or "").startswith(name)), DEFAULT_GPU)
