"""The chip that a program is lowered for. Lowering rules know it; the functions that they trace ask here."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

# Names of the devices of each platform of a lowering rule that has kernels.
_DEVICE_PLATFORMS = {"cuda": ("gpu", "cuda"), "tpu": ("tpu",)}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip. What is unknown is None, as when a program is exported on a machine without the chip.

    kind: `jax.Device.device_kind`.
    compute_capability: that of an NVIDIA GPU, such as (9, 0).
    """

    kind: str | None = None
    compute_capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Return the chip's name and, if known, its architecture."""
        sm = "" if self.compute_capability is None else " (sm_{}{})".format(*self.compute_capability)
        return f"{self.kind}{sm}"


_current: contextvars.ContextVar[Chip | None] = contextvars.ContextVar("pallas_gla_chip", default=None)


def current() -> Chip:
    """Return the chip lowered for. Outside a lowering rule, the abstract device of the context mesh."""
    return _current.get() or Chip(_abstract_kind())


@contextlib.contextmanager
def lowering_for(platform: str, ctx: Any) -> Iterator[None]:
    """Set the chip for the functions that a lowering rule of `platform` traces, from the rule's context."""
    token = _current.set(_find(platform, ctx.module_context))
    try:
        yield
    finally:
        _current.reset(token)


def _find(platform: str, module: Any) -> Chip:
    wanted = _DEVICE_PLATFORMS.get(platform, ())
    devices = getattr(module.axis_context, "device_assignment", None)
    devices = devices or (module.backend.devices() if module.backend else ())
    chips = [_of_device(device) for device in devices if device.platform in wanted]
    if chips:
        # In a machine with several kinds of GPU the oldest one decides.
        return min(chips, key=lambda chip: chip.compute_capability or (0, 0))
    return Chip(_abstract_kind() if platform == _platform(_abstract_kind()) else None)


def _of_device(device: Any) -> Chip:
    version = re.match(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return Chip(device.device_kind, (int(version[1]), int(version[2])) if version else None)


def _abstract_kind() -> str | None:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return None if device is None else device.device_kind


def _platform(kind: str | None) -> str:
    return "tpu" if (kind or "").startswith("TPU") else "cuda"
