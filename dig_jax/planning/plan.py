"""What a config takes on chips that need not be there: memory, time, and the largest batch that fits.

The train step and the sampler are compiled for a topology, exactly as a run would; what they do is counted in
the compiled programs (`planning.program`) and set against the chips' peaks (`planning.roofline`).
"""

import dataclasses
import functools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dig_jax.components import Components, param_count
from dig_jax.config import Config
from dig_jax.hardware.hlo_cost import Counts, count
from dig_jax.hardware.model_flops import training_flops
from dig_jax.hardware.roofline import roofline
from dig_jax.parallel import batch_sharding, batch_shards, make_mesh, replicated, sampling_mesh
from dig_jax.planning.compiling import CompiledProgram, compiled, optimized
from dig_jax.planning.fitting import largest_fitting
from dig_jax.planning.summary import summary
from dig_jax.planning.topology import THIS, Topology, find_topology
from dig_jax.progress import duration
from dig_jax.sampling.generate import GenerationSpec, generate
from dig_jax.training.compile import abstract_batch, lower_train_step
from dig_jax.training.state import abstract_state, with_sharding

__all__ = ["THIS", "plan", "show"]

log = logging.getLogger(__name__)


def show(settings: Config, topology: str, as_json: bool) -> None:
    """Writes `plan` to standard output, as text or as JSON.

    Raises:
        UserError: as `plan` does.
    """
    figures = plan(settings, topology)
    sys.stdout.write((json.dumps(figures, indent=2) if as_json else summary(figures)) + "\n")


def plan(settings: Config, topology: str, *, train_only: bool = False) -> dict[str, Any]:
    """What the config's train step and sampler take on the chips of a topology.

    Args:
        settings: whose data need not exist, where config.data.options says the images' size.
        topology: `this` for the machine's own devices, or a name such as v5e:16x16 or h100:8x4.
        train_only: neither look for the largest batch that fits, nor at the sampler: it saves minutes.

    Returns:
        Nested dicts of plain numbers, in bytes, seconds and flops; what is not known is None.

    Raises:
        ConfigError: an unknown topology, or a config that cannot be.
        UserError: the compiler for these chips is not installed.
    """
    target = find_topology(topology)
    run = _Run.of(_without_data(settings), target)
    parameters = param_count(run.state["params"])
    log.info(
        "%s, %.2f M parameters, for %d × %s",
        settings.model.name,
        parameters / 1e6,
        target.chips,
        target.chip.name if target.chip else target.devices[0].device_kind,
    )
    steps = {run.images: _train_step(run)}

    def needed(images: int) -> float:
        if images not in steps:
            steps[images] = _train_step(run.with_images(images))
        return steps[images]["memory_needed"]

    limit = _memory_limit(target)
    figures = {
        "model": settings.model.name,
        "parameters": parameters,
        "topology": topology,
        "chips": target.chips,
        "mesh": dict(run.mesh.shape),
        "chip": None if target.chip is None else dataclasses.asdict(target.chip),
        "memory_limit": limit,
        "model_flops_per_image": run.model_flops,
        "steps": settings.training.steps,
        "train": steps[run.images],
    }
    if train_only:
        return figures
    if limit is not None:
        best = largest_fitting(needed, run.images, _state_bytes(run.state), limit)
        figures["train_at_largest_batch"] = steps[best] if best else None
    return figures | {"sampler": _sampler(run)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """A config on a mesh of the topology's devices."""

    components: Components
    topology: Topology
    mesh: Mesh
    state: Any

    @classmethod
    def of(cls, settings: Config, topology: Topology) -> "_Run":
        size, accumulation = settings.data.batch_size, settings.training.accumulation
        mesh = make_mesh(settings.mesh, size, accumulation, devices=topology.devices)
        components = Components(settings)
        return cls(components, topology, mesh, abstract_state(components, mesh))

    @property
    def settings(self) -> Config:
        return self.components.config

    @property
    def images(self) -> int:
        """Images of a micro-batch in each of the parts that a batch is split into."""
        return self.settings.data.batch_size // (
            batch_shards(self.mesh) * self.settings.training.accumulation
        )

    @property
    def drawn(self) -> int:
        """Images of a batch of the sampler."""
        parts = batch_shards(self.mesh)
        return -(-self.settings.sampling.batch_size // parts) * parts

    def with_images(self, images: int) -> "_Run":
        size = images * batch_shards(self.mesh) * self.settings.training.accumulation
        data = dataclasses.replace(self.settings.data, batch_size=size)
        return _Run.of(dataclasses.replace(self.settings, data=data), self.topology)

    @functools.cached_property
    def model_flops(self) -> int:
        """Of training on one image."""
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state["params"])
        image = jax.ShapeDtypeStruct((1, *self.components.image_spec.image_shape), jnp.float32)
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        return training_flops(self.components.denoise, params, image, number, number)


def _without_data(settings: Config) -> Config:
    """The config with made-up images where its options say their shape: the real ones need not be there."""
    options = settings.data.options
    if not {"image_size", "num_classes"} <= options.keys():
        return settings
    shape = {name: options[name] for name in ("image_size", "channels", "num_classes") if name in options}
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, name="fake", options=shape))


def _memory_limit(topology: Topology) -> float | None:
    """Bytes that a program may use on a device."""
    chip = topology.chip
    return None if chip is None else chip.memory * chip.usable_fraction / chip.devices


def _train_step(run: _Run) -> dict[str, Any]:
    """The compiled train step's memory per device, counts per device and times."""
    size = run.settings.data.batch_size
    figures = _figures(run, _lower_train_step, "train step", size)
    if "memory" in figures:
        batch = abstract_batch(run.components, run.mesh)
        arguments = {
            "parameters": _state_bytes(run.state["params"]),
            "averages": _state_bytes(run.state["ema"]),
            "optimizer": _state_bytes(run.state["opt_state"]),
            "batch": _state_bytes(batch),
        }
        padding = figures["memory"].pop("arguments") - sum(arguments.values())
        figures["memory"] = arguments | {"padding": padding} | figures["memory"]
    if figures.get("seconds"):
        chip, seconds = run.topology.chip, figures["step_seconds"]
        days = seconds * run.settings.training.steps / 86400
        figures |= {
            "mfu": run.model_flops * size / (seconds * chip.flops["bfloat16"] * run.topology.chips),
            "days": days,
            "chip_hours": 24 * days * run.topology.chips,
        }
    return figures | {"images_per_device": run.images}


def _sampler(run: _Run) -> dict[str, Any]:
    """The same of drawing one batch of images, as the config's `sampling` says."""
    settings = run.settings.sampling
    what = f"sampler ({settings.sampler}, {settings.steps} steps)"
    figures = _figures(run, _lower_sampler, what, run.drawn)
    return figures | {"sampler": settings.sampler, "sampler_steps": settings.steps}


def _lower_train_step(run: _Run) -> jax.stages.Lowered:
    with jax.set_mesh(run.mesh):
        return lower_train_step(run.components, run.mesh, run.state)


def _lower_sampler(run: _Run) -> jax.stages.Lowered:
    settings, mesh = run.settings.sampling, sampling_mesh(run.mesh)
    numbers = jax.ShapeDtypeStruct((run.drawn,), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return generate.lower(
            with_sharding(run.state["params"], mesh),
            labels=numbers,
            seeds=numbers,
            scale=jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)),
            spec=GenerationSpec.of(run.components, guided=settings.guidance_scale != 1),
        )


def _figures(run: _Run, lower: Callable[[_Run], jax.stages.Lowered], what: str, size: int) -> dict[str, Any]:
    """Compiles a program that makes or takes `size` images; says what it needs, per device."""
    began = time.monotonic()
    log.info("compiling the %s for %d images …", what, size)
    figures = {"batch_size": size}
    try:
        program = _program(run, lower)
    except jax.errors.JaxRuntimeError as error:
        return figures | {"memory_needed": _refused(error)}
    counts = count(program.text)
    log.info("compiled, in %s", duration(time.monotonic() - began))
    return figures | {
        "memory": program.memory,
        "memory_needed": sum(program.memory.values()),
        "flops": dict(counts.flops),
        "bytes": counts.bytes,
        "collectives": counts.exchanged(),
        **_times(run, counts, size),
    }


def _program(run: _Run, lower: Callable[[_Run], jax.stages.Lowered]) -> CompiledProgram:
    if run.topology.name == THIS or not run.topology.chip.ring:
        return compiled(lower(run))
    return optimized(functools.partial(_lower_elsewhere, lower, run.settings, run.topology.name))


def _lower_elsewhere(
    lower: Callable[[_Run], jax.stages.Lowered], settings: Config, topology: str
) -> jax.stages.Lowered:
    """Lowers in another process, to which neither a run nor what is lowered could be sent."""
    return lower(_Run.of(settings, find_topology(topology)))


def _times(run: _Run, counts: Counts, size: int) -> dict[str, Any]:
    if run.topology.chip is None:
        return {}
    times = roofline(counts, run.topology.chip, list(run.mesh.devices.flat))
    return {
        "seconds": dataclasses.asdict(times),
        "step_seconds": times.seconds,
        "bound": times.bound,
        "images_per_second": size / times.seconds,
    }


def _refused(error: jax.errors.JaxRuntimeError) -> float:
    """The bytes that a program would need, of the compiler's refusal.

    Raises:
        JaxRuntimeError: it refused for another reason.
    """
    found = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMGT]?)", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not found:
        raise error
    needed = float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")
    log.info("it does not fit: %.2f GiB per device", needed / 2**30)
    return needed


def _state_bytes(tree: Any) -> int:
    """Bytes on a device, without the padding of a layout."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
