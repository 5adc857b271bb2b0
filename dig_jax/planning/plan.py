"""--mode=plan: memory, time and the largest batch of a config on chips that need not be present.

The train step and the sampler are compiled for a topology exactly as a run compiles them. The compiled
programs are counted (`hardware.hlo_cost`) and compared with the chips' peak rates (`hardware.roofline`).
"""

import dataclasses
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from dig_jax.components import param_count
from dig_jax.config import Config
from dig_jax.hardware.hlo_cost import Counts, count
from dig_jax.hardware.roofline import roofline
from dig_jax.planning.fitting import largest_fitting
from dig_jax.planning.planned_run import PlannedRun, bytes_per_device, lower_sampler, lower_train_step
from dig_jax.planning.prices import Price, cost, find_price
from dig_jax.planning.summary import summary
from dig_jax.planning.topology import THIS, Topology, find_topology
from dig_jax.progress import duration
from dig_jax.training.compile import abstract_batch

__all__ = ["THIS", "plan", "show"]

log = logging.getLogger(__name__)


def show(settings: Config, topology: str, as_json: bool) -> None:
    """Write a plan to standard output as text or JSON; arguments as of `plan`.

    Raises:
        UserError: as `plan` does.
    """
    figures = plan(settings, topology)
    sys.stdout.write((json.dumps(figures, indent=2) if as_json else summary(figures)) + "\n")


def plan(settings: Config, topology: str, *, train_only: bool = False) -> dict[str, Any]:
    """Return the memory and time of the config's train step and sampler on the chips of a topology.

    Args:
        settings: the config. Its data need not exist if config.data.options has the image size.
        topology: "this" for the machine's own devices, or a name such as "v5e:16x16" or "h100:8x4".
        train_only: skip the sampler and the search for the largest batch, which take minutes.

    Returns:
        Nested dicts of numbers in bytes, seconds and FLOPs. Unknown figures are None or omitted.

    Raises:
        ConfigError: an unknown topology, or an invalid config.
        UserError: the compiler for these chips is not installed.
    """
    target = find_topology(topology)
    hourly = find_price(target.chip and target.chip.name, settings.plan.price)
    run = PlannedRun.of(without_data(settings), target)
    parameters = param_count(run.state["params"])
    log.info(
        "%s, %.2f M parameters, for %d × %s",
        settings.model.name,
        parameters / 1e6,
        target.chips,
        target.chip.name if target.chip else target.devices[0].device_kind,
    )
    steps = {run.images_per_device: _train_step(run, hourly)}

    def needed(images: int) -> float:
        if images not in steps:
            steps[images] = _train_step(run.with_images_per_device(images), hourly)
        return steps[images]["memory_needed"]

    limit = _memory_limit(target)
    figures = {
        "model": settings.model.name,
        "parameters": parameters,
        "topology": topology,
        "chips": target.chips,
        "mesh": dict(run.mesh.shape),
        "chip": None if target.chip is None else dataclasses.asdict(target.chip),
        "price": hourly and dataclasses.asdict(hourly),
        "memory_limit": limit,
        "model_flops_per_image": run.model_flops_per_image,
        "steps": settings.training.steps,
        "train": steps[run.images_per_device],
    }
    if train_only:
        return figures
    if limit is not None:
        best = largest_fitting(needed, run.images_per_device, bytes_per_device(run.state), limit)
        figures["train_at_largest_batch"] = steps[best] if best else None
    return figures | {"sampler": _sampler(run)}


def without_data(settings: Config) -> Config:
    """Replace the data by synthetic images if config.data.options has their shape."""
    options = settings.data.options
    if not {"image_size", "num_classes"} <= options.keys():
        return settings
    shape = {name: options[name] for name in ("image_size", "channels", "num_classes") if name in options}
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, name="fake", options=shape))


def bytes_of_refusal(error: Exception) -> float:
    """Return the bytes that a program needs, from the compiler's out-of-memory error.

    Raises:
        Exception: `error` itself, if it is not an out-of-memory error.
    """
    found = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMGT]?)", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not found:
        raise error
    return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")


def _memory_limit(topology: Topology) -> float | None:
    """Return the bytes of a device that are available to a program."""
    chip = topology.chip
    return None if chip is None else chip.memory * chip.usable_fraction / chip.devices


def _train_step(run: PlannedRun, price: Price | None) -> dict[str, Any]:
    """Return the figures of the compiled train step, and its cost; of the largest of `data.buckets`."""
    size, chip, chips = run.settings.data.batch_size, run.topology.chip, run.topology.chips
    figures = _figures(run, lower_train_step, "train step", size)
    if "memory" in figures:
        arguments = {
            "parameters": bytes_per_device(run.state["params"]),
            "averages": bytes_per_device(run.state["ema"]),
            "optimizer": bytes_per_device(run.state["opt_state"]),
            "batch": bytes_per_device(abstract_batch(run.components, run.mesh)),
        }
        padding = figures["memory"].pop("arguments") - sum(arguments.values())
        figures["memory"] = arguments | {"padding": padding} | figures["memory"]
    if chip is not None and "step_seconds" in figures:
        seconds = figures["step_seconds"]
        days = seconds * run.settings.training.steps / 86400
        figures |= {
            "mfu": run.model_flops_per_image * size / (seconds * chip.flops["bfloat16"] * chips),
            "days": days,
            "chip_hours": 24 * days * chips,
            "cost": cost(seconds, chips, price),
        }
    if run.components.bucket_sizes:
        figures["bucket"] = "x".join(map(str, run.components.largest_shape[:2]))
    return figures | {"images_per_device": run.images_per_device}


def _sampler(run: PlannedRun) -> dict[str, Any]:
    """Return the figures of generating one batch of images."""
    settings = run.settings.sampling
    name = f"sampler ({settings.sampler}, {settings.steps} steps)"
    figures = _figures(run, lower_sampler, name, run.sampler_batch_size)
    return figures | {"sampler": settings.sampler, "sampler_steps": settings.steps}


def _figures(
    run: PlannedRun, lower: Callable[[PlannedRun], jax.stages.Lowered], name: str, size: int
) -> dict[str, Any]:
    """Compile a program for `size` images and return its figures per device."""
    start = time.monotonic()
    log.info("compiling the %s for %d images …", name, size)
    figures = {"batch_size": size}
    try:
        program = run.compile(lower)
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_of_refusal(error)
        log.info("does not fit: needs %.2f GiB per device", needed / 2**30)
        return figures | {"memory_needed": needed}
    counts = count(program.text)
    log.info("compiled in %s", duration(time.monotonic() - start))
    return figures | {
        "memory": program.memory,
        "memory_needed": sum(program.memory.values()),
        "flops": dict(counts.flops),
        "bytes": counts.bytes,
        "collectives": counts.exchanged(),
        **_times(run, counts, size),
    }


def _times(run: PlannedRun, counts: Counts, size: int) -> dict[str, Any]:
    if run.topology.chip is None:
        return {}
    times = roofline(counts, run.topology.chip, list(run.mesh.devices.flat))
    return {
        "seconds": dataclasses.asdict(times),
        "step_seconds": times.seconds,
        "bound": times.bound,
        "images_per_second": size / times.seconds,
    }
