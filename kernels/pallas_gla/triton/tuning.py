"""Tuning parameters of the Triton kernels, by device kind."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTuning:
    """Tuning parameters for one kind of GPU.

    cores: number of streaming multiprocessors. If there are fewer programs (batch * heads) than two per core,
        a long scan is split along T.
    warps, stages: Triton's `num_warps` and `num_stages`. With two stages, the next chunk is copied to shared
        memory while a chunk runs.
    staged_state: the largest padded state of 16-bit numbers with `stages`. Larger ones take one, because
        their tiles do not fit into shared memory twice.
    large_warps: replaces `warps` if a padded state has more than `large_state` entries.
    float32_values: the most values of a head that one launch of the float32 backward kernel takes. Before
        sm_90 the operands of its products are in registers, and 64 values spill 106 KB, 32 values 14 KB.
    least_chunks: the fewest chunks in a part of a split scan, because splitting costs a second pass.
    least_parts: the fewest parts of a scan with at least one program per core; fewer save less than the
        second pass costs (an H200 at 144 programs of 64 chunks: 3 parts are slower than 1, and 8 are faster).
    """

    cores: int
    warps: int = 4
    large_warps: int = 8
    stages: int = 2
    staged_state: int = 64 * 128
    large_state: int = 64 * 64
    float32_values: int = 32
    least_chunks: int = 8
    least_parts: int = 8

    def parts(self, programs: int, chunks: int) -> int:
        """Return the number of parts into which a scan of `chunks` chunks is split along T."""
        parts = min(max(2 * self.cores // programs, self.least_parts), chunks // self.least_chunks)
        least = self.least_parts if programs >= self.cores else 3
        if programs >= 2 * self.cores or parts < least:
            return 1
        return -(-chunks // -(-chunks // parts))

    def num_warps(self, state_size: int) -> int:
        """Return `num_warps` for a padded state of `state_size` entries."""
        return self.large_warps if state_size > self.large_state else self.warps

    def num_stages(self, state_size: int, itemsize: int) -> int:
        """Return `num_stages` for a padded state of `state_size` entries of `itemsize` bytes."""
        return 1 if state_size > self.staged_state or itemsize > 2 else self.stages


# By prefix of `jax.Device.device_kind`.
GPUS = {
    "NVIDIA A100": GpuTuning(cores=108),
    "NVIDIA H100": GpuTuning(cores=132, float32_values=128),
    "NVIDIA H200": GpuTuning(cores=132, float32_values=128),
    "NVIDIA B200": GpuTuning(cores=148, float32_values=128),
}
# The smallest shared memory of a GPU since Ampere is 99 KB.
DEFAULT_GPU = dataclasses.replace(GPUS["NVIDIA H200"], staged_state=32 * 64, float32_values=32)


def gpu(device_kind: str | None) -> GpuTuning:
    """Return the parameters for a device kind, or the default for an unknown one."""
    return next((x for name, x in GPUS.items() if (device_kind or "").startswith(name)), DEFAULT_GPU)
