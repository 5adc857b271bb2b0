"""The selective scan as Pallas kernels for NVIDIA GPUs."""

from pallas_gla.selective_scan.scan import Operands, Options


def unsupported(operands: Operands, options: Options) -> str | None:
    """Return why the kernels do not support a scan, or None if they do."""
    return "no kernel"
