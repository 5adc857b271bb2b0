"""Process-wide settings: CPU devices and memory, the compilation cache, LLVM.

Only programs call these functions; the library does not.
"""

import _thread
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from dig_jax.errors import ConfigError, UserError, one_line

log = logging.getLogger(__name__)

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_HIT = "/jax/compilation_cache/cache_hits"


def set_numerics() -> None:
    """Set the dtypes that the program depends on, whatever JAX_ENABLE_X64 and similar variables say."""
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")


def require_devices() -> None:
    """Initialize JAX's backends.

    Raises:
        UserError: JAX finds no device of the platforms that it must use.
    """
    with _plugin_failures() as failures:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # AssertionError: CUDA without a driver
            platforms = jax.config.values["jax_platforms"]
            asked = f" for JAX_PLATFORMS={platforms}" if platforms else ""
            reason = "; ".join(failures) or one_line(error, name_type=True)
            raise UserError(
                f"JAX found no device{asked}: {reason}; set JAX_PLATFORMS=cpu to use the CPU"
            ) from error
    for failure in failures:
        log.warning(failure)


@contextlib.contextmanager
def _plugin_failures() -> Iterator[list[str]]:
    """Yield a list that gets one line for each plugin of JAX that fails; JAX logs a traceback."""
    failures: list[str] = []

    def hold(record: logging.LogRecord) -> bool:
        error = record.exc_info and record.exc_info[1]
        if not error:
            return True
        failures.append(f"{record.getMessage().splitlines()[0]}: {one_line(error)}")
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(hold)
    try:
        yield failures
    finally:
        logger.removeFilter(hold)


def enable_compilation_cache() -> None:
    """Let JAX cache compiled programs on disk, in ~/.cache/dig_jax/compiled or below XDG_CACHE_HOME.

    JAX_COMPILATION_CACHE_DIR overrides the directory; if it is empty, nothing is cached.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # the user has no home directory
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "dig_jax" / "compiled"))


def raise_lost_interrupts() -> None:
    """Raise Ctrl-C again if Python dropped it.

    Python drops a KeyboardInterrupt that a signal handler raises in a callback of its garbage collector, and
    JAX has such a callback.
    """
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            # By another thread, a moment later: here, and in Thread.start, it would be dropped again.
            _thread.start_new_thread(_interrupt_soon, ())
        else:
            show(unraisable)

    sys.unraisablehook = hook


def _interrupt_soon() -> None:
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)  # a real signal also wakes a call that waits


def disable_llvm_symbolizer() -> None:
    """Stop LLVM from symbolizing stack traces, unless LLVM_DISABLE_SYMBOLIZATION is set.

    Triton attaches a stack trace to every remark, and nobody sees the remarks. If llvm-symbolizer is
    installed, it takes two thirds of the time to compile a kernel.
    """
    os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")


@contextlib.contextmanager
def cache_hits() -> Iterator[list[str]]:
    """Yield a list that gets an entry for each program that is loaded from the cache."""
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
    """Split the CPU into devices, and keep freed memory in the process.

    Arrays of small models do not occupy all of XLA's threads; one device per core does. XLA frees a step's
    buffers at its end; by default glibc returns them to the kernel, and a quarter of the next step is spent
    on page faults. Only glibc's first arena keeps buffers above 64 MiB, so all threads use that one.

    Args:
        devices: number of devices, if XLA_FLAGS does not set it.

    Raises:
        ConfigError: JAX has already started with another number of devices, as in a notebook.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, 2**31 - 1)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**26)
    if devices == 1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if jax.config.values["jax_num_cpu_devices"] == devices:
        return
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError as error:
        raise ConfigError(
            f"invalid config.mesh.cpu_devices={devices}; JAX already runs in this process: expected 1, or a"
            " restart of the notebook"
        ) from error
