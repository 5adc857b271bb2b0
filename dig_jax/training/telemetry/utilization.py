"""What a step takes at best on the run's chips, to be set against what it took, and the devices' memory."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dig_jax.components import Components
from dig_jax.hardware.chips import Chip, chip_of_kind
from dig_jax.hardware.hlo_cost import count
from dig_jax.hardware.model_flops import training_flops
from dig_jax.hardware.roofline import roofline
from dig_jax.training.state import init_params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Peak:
    """Seconds per image, over all chips: of the model's flops at their peak, of the program's roofline.

    What is not known is None.
    """

    model: float | None = None
    program: float | None = None

    def shares(self, images_per_second: float) -> dict[str, float]:
        """mfu and roofline_share at this speed: 1 is the best that can be."""
        shares = {"mfu": self.model, "roofline_share": self.program}
        return {name: seconds * images_per_second for name, seconds in shares.items() if seconds}


def peak_of(components: Components, mesh: Mesh, train_step: Callable[..., Any]) -> Peak:
    """The peak of a run with this train step, a compiled one; nothing is known where the chip's is not.

    A figure that cannot be had ends no run: it is told, and left out.
    """
    chip = chip_of_kind(mesh.devices.flat[0].device_kind)
    if chip is None:
        return Peak()
    return Peak(
        _told("MFU", lambda: _model_seconds(components, mesh, chip)),
        _told("roofline", lambda: _program_seconds(components, mesh, chip, train_step)),
    )


def peak_memory(devices: Iterable[Any]) -> dict[str, float]:
    """peak_memory_gib: the most that any of these devices of JAX has held; empty where they do not tell."""
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [bytes_held for bytes_held in held if bytes_held]
    return {"peak_memory_gib": max(known) / 2**30} if known else {}


def _model_seconds(components: Components, mesh: Mesh, chip: Chip) -> float:
    params = jax.eval_shape(lambda: init_params(components))
    image = jax.ShapeDtypeStruct((1, *components.image_spec.image_shape), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    # One image on no mesh: on one, kernels would be seen with a device's part.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        flops = training_flops(components.denoise, params, image, number, number)
    return flops / (chip.flops["bfloat16"] * mesh.size / chip.devices)


def _program_seconds(components: Components, mesh: Mesh, chip: Chip, train_step: Callable[..., Any]) -> float:
    times = roofline(count(train_step.as_text()), chip, list(mesh.devices.flat))
    log.info("at best a step takes %.3g s, by the roofline of %s: %s", times.seconds, chip.name, times.bound)
    return times.seconds / components.config.data.batch_size


def _told(what: str, figure: Callable[[], float]) -> float | None:
    try:
        return figure()
    except Exception as error:  # of compilers' texts nothing is promised
        log.warning("the %s cannot be told: %s: %s", what, type(error).__name__, error)
        return None
