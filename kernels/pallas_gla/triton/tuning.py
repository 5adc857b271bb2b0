"""Block sizes of the GPU kernels: data by device kind and by the size of a head's state."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GpuTuning:
    """How the kernels fill a GPU.

    warps, stages: of a program, as Triton counts them.
    large_warps: warps where a padded state has more than `large_state` entries.
    cores: streaming multiprocessors. With fewer programs (batch * heads) than those, a long scan is split
        along T until there are two programs for each.
    least_chunks: chunks that a part of a split scan has at least, because every part costs a second pass.
    """

    cores: int
    warps: int = 4
    large_warps: int = 8
    stages: int = 1
    large_state: int = 64 * 64
    least_chunks: int = 8

    def parts(self, programs: int, chunks: int) -> int:
        """Into how many parts a scan of `chunks` chunks is split along T."""
        parts = min(2 * self.cores // programs, chunks // self.least_chunks)
        # Two parts would win about as much as the additional pass costs.
        if programs >= self.cores or parts <= 2:
            return 1
        return -(-chunks // -(-chunks // parts))

    def num_warps(self, state_size: int) -> int:
        """Warps of a program with a state of so many entries."""
        return self.large_warps if state_size > self.large_state else self.warps


# By the beginning of `jax.Device.device_kind`.
GPUS = {
    "NVIDIA A100": GpuTuning(cores=108),
    "NVIDIA H100": GpuTuning(cores=132),
    "NVIDIA H200": GpuTuning(cores=132),
    "NVIDIA B200": GpuTuning(cores=148),
}
DEFAULT_GPU = GPUS["NVIDIA H200"]


def gpu(device_kind: str | None) -> GpuTuning:
    """The tuning of a device, that of the H200 for an unknown one."""
    return next((x for name, x in GPUS.items() if (device_kind or "").startswith(name)), DEFAULT_GPU)
