"""Tuning parameters of the Triton kernels, by device kind."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTuning:
    """Tuning parameters for one kind of GPU.

    cores: number of streaming multiprocessors. If there are fewer programs (batch * heads) than cores, a long
        scan is split along T into up to two programs per core.
    warps, stages: Triton's `num_warps` and `num_stages`.
    large_warps: replaces `warps` if a padded state has more than `large_state` entries.
    least_chunks: the fewest chunks in a part of a split scan, because splitting costs a second pass.
    """

    cores: int
    warps: int = 4
    large_warps: int = 8
    stages: int = 1
    large_state: int = 64 * 64
    least_chunks: int = 8

    def parts(self, programs: int, chunks: int) -> int:
        """Return the number of parts into which a scan of `chunks` chunks is split along T."""
        parts = min(2 * self.cores // programs, chunks // self.least_chunks)
        # Two parts would save about as much time as the additional pass costs.
        if programs >= self.cores or parts <= 2:
            return 1
        return -(-chunks // -(-chunks // parts))

    def num_warps(self, state_size: int) -> int:
        """Return `num_warps` for a padded state of `state_size` entries."""
        return self.large_warps if state_size > self.large_state else self.warps


# By prefix of `jax.Device.device_kind`.
GPUS = {
    "NVIDIA A100": GpuTuning(cores=108),
    "NVIDIA H100": GpuTuning(cores=132),
    "NVIDIA H200": GpuTuning(cores=132),
    "NVIDIA B200": GpuTuning(cores=148),
}
DEFAULT_GPU = GPUS["NVIDIA H200"]


def gpu(device_kind: str | None) -> GpuTuning:
    """Return the parameters for a device kind, or the H200's for an unknown one."""
    return next((x for name, x in GPUS.items() if (device_kind or "").startswith(name)), DEFAULT_GPU)
