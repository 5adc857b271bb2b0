"""Utilization of the chips: model FLOP utilization, share of the roofline, and device memory."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dig_jax.components import Components
from dig_jax.errors import one_line
from dig_jax.hardware.chips import Chip, chip_of_kind
from dig_jax.hardware.hlo_cost import count
from dig_jax.hardware.model_flops import training_flops
from dig_jax.hardware.roofline import roofline
from dig_jax.training.state import init_params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BestTimes:
    """Lower bounds on the seconds per image, over all chips; None if unknown.

    Attributes:
        model: the model's FLOPs at the chips' peak rate.
        program: the compiled train step's roofline.
    """

    model: float | None = None
    program: float | None = None

    def utilization(self, images_per_second: float) -> dict[str, float]:
        """Return the fractions mfu and roofline_share at this speed, without unknown ones."""
        bounds = {"mfu": self.model, "roofline_share": self.program}
        return {name: seconds * images_per_second for name, seconds in bounds.items() if seconds}


def best_times(components: Components, mesh: Mesh, train_step: jax.stages.Compiled) -> BestTimes:
    """Return the best times of a run, empty for unknown chips.

    A failure to compute one of them is logged and does not end the run.
    """
    chip = chip_of_kind(mesh.devices.flat[0].device_kind)
    if chip is None:
        return BestTimes()
    return BestTimes(
        _or_none("MFU", lambda: _model_seconds(components, mesh, chip)),
        _or_none("roofline share", lambda: _program_seconds(components, mesh, chip, train_step)),
    )


def peak_memory(devices: Iterable[Any]) -> dict[str, float]:
    """Return {"peak_memory_gib": maximum over the devices}, empty if the devices do not report memory."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    reported = [peak for peak in peaks if peak]
    return {"peak_memory_gib": max(reported) / 2**30} if reported else {}


def _model_seconds(components: Components, mesh: Mesh, chip: Chip) -> float:
    params = jax.eval_shape(lambda: init_params(components))
    image = jax.ShapeDtypeStruct((1, *components.image_spec.image_shape), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    # Without a mesh: on a mesh, kernels are traced with the shapes of one device's shard.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        flops = training_flops(components.denoise, params, image, number, number)
    return flops / (chip.flops["bfloat16"] * mesh.size / chip.devices)


def _program_seconds(
    components: Components, mesh: Mesh, chip: Chip, train_step: jax.stages.Compiled
) -> float:
    times = roofline(count(train_step.as_text() or ""), chip, list(mesh.devices.flat))
    log.info("roofline of %s: at least %.3g s per step, bound by %s", chip.name, times.seconds, times.bound)
    return times.seconds / components.config.data.batch_size


def _or_none(name: str, compute: Callable[[], float]) -> float | None:
    try:
        return compute()
    except Exception as error:  # compilers may change the text that is parsed
        log.warning("could not compute the %s: %s", name, one_line(error, name_type=True))
        return None
