"""Choice of the implementation that runs a scan.

A backend is a module with four functions. They run under jit, for one platform and on one shard:

    unsupported(operands, scan) -> str | None
        why the backend does not support this scan: the argument, its value and the expected values
    forward(operands, scan, *, save) -> (out, final_state, states)
        out in the dtype of v, final_state in float32, and, if `save`, the states for `backward`
        (`saved_shape`)
    backward(operands, states, d_out, d_final_state, scan) -> Operands
        the gradient of each operand, in the operand's dtype
    tangent(operands, tangents, scan) -> (d_out, d_final_state) | None
        the tangents of `forward`'s results; `tangents` holds None for an operand whose tangent is zero. The
        result is None if this shape has no such kernel; plain JAX, which needs none, then runs instead

Tokens are in raster order. Each backend handles `scan.direction` itself, so that a kernel can reorder tokens
while it loads a tile. A one-dimensional scan is a grid with one row.
"""

import functools
import importlib
import logging
from types import ModuleType

from pallas_gla.scan import Operands, Scan
from pallas_gla.validation import one_of

log = logging.getLogger("pallas_gla")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Plain JAX functions, which JAX differentiates and partitions.
PLAIN = {"reference": "pallas_gla.reference", "xla": "pallas_gla.chunked_xla"}
# Plain JAX that is fast on CPUs. It differentiates itself, and runs only by default.
CPU = "pallas_gla.cpu.backend"
# By name and platform. The first entry of a platform is its default.
KERNELS = {
    ("triton", "cuda"): "pallas_gla.triton.backend",
    ("mosaic", "tpu"): "pallas_gla.mosaic_tpu.backend",
    ("mosaic", "cuda"): "pallas_gla.mosaic_gpu.backend",  # experimental, and therefore never the default
}
KERNEL_NAMES = tuple(dict.fromkeys(name for name, _ in KERNELS))


def check(implementation: str | None, interpret: bool | None) -> None:
    """Raise unless the implementation exists and supports `interpret`."""
    names = (*PLAIN, *KERNEL_NAMES)
    if implementation not in (None, *names):
        expected = one_of((None, *map(repr, names)))
        raise ValueError(f"invalid implementation: got {implementation!r}; expected {expected}")
    if interpret and implementation in PLAIN:
        raise NotImplementedError(
            f"interpret=True requires a Pallas kernel: got implementation={implementation!r}; expected"
            f" {one_of((*map(repr, KERNEL_NAMES), None))}"
        )


def plain(implementation: str) -> ModuleType:
    """Return the module of a plain JAX implementation."""
    return importlib.import_module(PLAIN[implementation])


def choose(
    implementation: str | None, operands: Operands, scan: Scan, platform: str, partitioned: bool
) -> ModuleType:
    """Return the backend for a program that is lowered for `platform`.

    Args:
        implementation: name of a kernel, or None for the best backend that supports the scan.
        operands: only their shapes and dtypes are used.
        scan: the static description of the scan.
        platform: JAX's name for the platform, as in lowering rules.
        partitioned: whether XLA will partition the program over several devices, which kernels do not allow.

    Raises:
        NotImplementedError: the named kernel does not support this scan or this platform.
    """
    if implementation is None and not scan.interpret:
        name, reason = _automatic(operands, scan, platform, partitioned)
        log_once(name, platform, reason)
        return _module(name, platform)
    kernel = _kernel(implementation, scan, platform)
    if reason := _unsupported(kernel, operands, scan):
        raise NotImplementedError(f"implementation={implementation!r} does not support this call: {reason}")
    return kernel


def _automatic(operands: Operands, scan: Scan, platform: str, partitioned: bool) -> tuple[str, str | None]:
    """Return the name of the best implementation and, if it is not a kernel, the reason."""
    name = (
        "cpu" if platform == "cpu" else next((name for name, target in KERNELS if target == platform), None)
    )
    if name is None:
        return "xla", f"no kernel for {platform}"
    if partitioned:
        return "xla", "several devices without a mesh; jax.set_mesh lets the kernel run per shard"
    reason = _unsupported(_module(name, platform), operands, scan)
    return ("xla", reason) if reason else (name, None)


def _unsupported(kernel: ModuleType, operands: Operands, scan: Scan) -> str | None:
    """Return why a kernel does not support a scan, or None if it does."""
    symbolic = not all(isinstance(size, int) for size in operands.q.shape)
    if symbolic and kernel.__name__ != CPU:
        return f"unsupported shape of q: got the symbols {operands.q.shape}; expected numbers"
    return kernel.unsupported(operands, scan)


def _module(name: str, platform: str) -> ModuleType:
    return importlib.import_module(CPU if name == "cpu" else PLAIN.get(name) or KERNELS[name, platform])


def _kernel(implementation: str | None, scan: Scan, platform: str) -> ModuleType:
    """Return the kernel of this name for a platform. In interpret mode any kernel runs on any platform."""
    choices = [key for key in KERNELS if implementation in (None, key[0])]
    matching = [key for key in choices if key[1] == platform]
    if not matching and not scan.interpret:
        raise NotImplementedError(
            f"implementation={implementation!r} does not run on this platform: got {platform}; expected"
            f" {one_of(tuple(key[1] for key in choices))}. Use interpret=True to run it anywhere, or"
            " implementation=None to select an implementation automatically"
        )
    try:
        return importlib.import_module(KERNELS[(matching or choices)[0]])
    except ImportError as error:
        raise NotImplementedError(f"implementation={implementation!r} cannot be imported: {error}") from error


@functools.cache
def log_once(name: str, platform: str, reason: str | None) -> None:
    """Log, once per combination, the implementation that a platform runs and why it is not a kernel."""
    log.info("GLA on %s runs %r%s", platform, name, f": {reason}" if reason else "")
