"""What makes a small model fast on a CPU; to be called before JAX is first used, and harmless elsewhere."""

import ctypes
import os

import jax

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def prepare_cpu(devices: int) -> None:
    """Splits the CPU into so many devices, and keeps freed memory in the process.

    The arrays of a small model are too small for XLA's own threads: one device per core uses the cores. And
    XLA frees a step's buffers at its end; by default glibc gives them back to the kernel, and a quarter of
    the next step is spent on getting them again.

    Args:
        devices: 1 leaves it at one. Where XLA_FLAGS already asks for a number, that one holds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**26)
    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
