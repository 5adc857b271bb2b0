"""Chooses the kernel that runs a scan.

A backend is a module with three functions, called under jit for one platform and on one shard:

    unsupported(operands, scan) -> str | None
        why it cannot run this, naming the argument, what it got and what is accepted
    forward(operands, scan, *, save) -> (out, final_state, states)
        out in the dtype of v, final_state in float32, and if `save` what `backward` needs (`saved_shape`)
    backward(operands, states, d_out, d_final_state, scan) -> Operands
        the gradient of each operand in its dtype

Tokens come and go in raster order: ordering them by `scan.direction` is the backend's own business, so that a
kernel can do it while it loads a tile. A one-dimensional scan is a grid of one row.
"""

import functools
import importlib
import logging
from types import ModuleType

from pallas_gla.scan import Operands, Scan

log = logging.getLogger("pallas_gla")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Plain JAX, which is differentiated and partitioned like any other.
PLAIN = {"reference": "pallas_gla.reference", "xla": "pallas_gla.chunked_xla"}
# By name and platform; the first name of a platform is its default.
KERNELS = {
    ("triton", "cuda"): "pallas_gla.triton.backend",
    ("mosaic", "tpu"): "pallas_gla.mosaic_tpu.backend",
    ("mosaic", "cuda"): "pallas_gla.mosaic_gpu.backend",  # an experiment, only by name
}
NAMES = (*PLAIN, *dict.fromkeys(name for name, _ in KERNELS))


def check(implementation: str | None, interpret: bool | None) -> None:
    """Raises unless the name is known and fits `interpret`."""
    if implementation not in (None, *NAMES):
        known = ", ".join(map(repr, NAMES))
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")
    if interpret and implementation in PLAIN:
        raise NotImplementedError(
            f"interpret=True needs a Pallas kernel, and implementation={implementation!r} is none;"
            f" accepted are {', '.join(repr(name) for name in NAMES if name not in PLAIN)}"
        )


def plain(implementation: str) -> ModuleType:
    """The module of a plain JAX implementation."""
    return importlib.import_module(PLAIN[implementation])


def choose(
    implementation: str | None, operands: Operands, scan: Scan, platform: str, partitioned: bool
) -> ModuleType:
    """The backend for a program that is lowered for `platform`.

    Args:
        implementation: a kernel's name, or None for the best backend that can run this.
        operands: of which only shapes and dtypes matter.
        scan: the rest of the question.
        platform: as JAX names it in lowering rules.
        partitioned: whether XLA will split the program over several devices, which it cannot do to a kernel.

    Raises:
        NotImplementedError: the named kernel cannot run this, or not there.
    """
    if implementation is None and not scan.interpret:
        name, reason = _automatic(operands, scan, platform, partitioned)
        log_once(name, platform, reason)
        return _module(name, platform)
    kernel = named(implementation, scan, platform)
    if reason := kernel.unsupported(operands, scan):
        raise NotImplementedError(f"implementation={implementation!r} cannot run this: {reason}")
    return kernel


def _automatic(operands: Operands, scan: Scan, platform: str, partitioned: bool) -> tuple[str, str | None]:
    """Return the best implementation's name, and why it is not the platform's kernel."""
    name = next((name for name, target in KERNELS if target == platform), None)
    if name is None:
        return "xla", f"no kernel for {platform}"
    if partitioned:
        return "xla", "several devices, and no mesh set by jax.set_mesh to run the kernel per shard"
    reason = _module(name, platform).unsupported(operands, scan)
    return ("xla", reason) if reason else (name, None)


def _module(name: str, platform: str) -> ModuleType:
    return importlib.import_module(PLAIN.get(name) or KERNELS[name, platform])


def named(implementation: str | None, scan: Scan, platform: str) -> ModuleType:
    """The kernel of this name for a platform; in interpret mode every kernel runs everywhere.

    Raises:
        NotImplementedError: the kernel is for other platforms.
    """
    choices = [key for key in KERNELS if implementation in (None, key[0])]
    here = [key for key in choices if key[1] == platform]
    if not here and not scan.interpret:
        meant = " and ".join(key[1] for key in choices)
        raise NotImplementedError(
            f"implementation={implementation!r} is a kernel for {meant}, and this program is compiled for"
            f" {platform}; interpret=True runs it anywhere, implementation=None takes what fits"
        )
    return importlib.import_module(KERNELS[(here or choices)[0]])


@functools.cache
def log_once(name: str, platform: str, reason: str | None) -> None:
    """Log which implementation runs on a platform, and why not its kernel, the first time that it is so."""
    log.info("GLA on %s runs %r%s", platform, name, f": {reason}" if reason else "")
