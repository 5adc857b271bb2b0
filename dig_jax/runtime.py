"""Process-wide settings for programs: CPU devices and memory, the compilation cache, LLVM."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_HIT = "/jax/compilation_cache/cache_hits"


def keep_compiled_programs() -> None:
    """Has JAX keep what takes a second or more to compile, unless it was told where by its own setting.

    JAX_COMPILATION_CACHE_DIR names the directory, an empty one for none; by default it is
    ~/.cache/dig_jax/compiled, or where XDG_CACHE_HOME has the user's caches. To be called by programs, not by
    libraries: it holds for all that the process compiles.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "dig_jax" / "compiled"))


def leave_stacks_without_names() -> None:
    """Has LLVM look up no names for stacks, unless the environment says otherwise.

    Compiling GPU kernels, Triton makes remarks that nobody sees, each with a stack: where llvm-symbolizer is
    installed, to name its functions takes twice as long as all the rest. To be called by programs.
    """
    os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """While it is open, the list gets an entry for each program that is loaded instead of compiled."""
    hits: list[str] = []

    def listen(event: str, **_: object) -> None:
        if event == _HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


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
