"""A config on the devices of a topology: its abstract state and its compiled programs."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dig_jax.components import Components, network_params
from dig_jax.config import Config
from dig_jax.errors import ConfigError
from dig_jax.hardware.model_flops import training_flops
from dig_jax.parallel import batch_sharding, batch_shards, make_mesh, replicated, sampling_mesh
from dig_jax.planning.compiling import CompiledProgram, compile_fully, compile_without_codegen
from dig_jax.planning.topology import THIS, Topology, find_topology
from dig_jax.sampling.generate import generate
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.training import compile as train_compile
from dig_jax.training.state import abstract_state, with_sharding


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedRun:
    """A config on a mesh of a topology's devices."""

    components: Components
    topology: Topology
    mesh: Mesh
    state: Any

    @classmethod
    def of(cls, settings: Config, topology: Topology) -> "PlannedRun":
        """Return the run of a config on a topology.

        Raises:
            ConfigError: an invalid config, or one that does not fit the number of devices.
        """
        size, accumulation = settings.data.batch_size, settings.training.accumulation
        mesh = make_mesh(settings.mesh, size, accumulation, devices=topology.devices)
        components = Components(settings)
        return cls(components, topology, mesh, abstract_state(components, mesh))

    @property
    def settings(self) -> Config:
        """The config."""
        return self.components.config

    @property
    def images_per_device(self) -> int:
        """Images per shard of a micro-batch."""
        return self.settings.data.batch_size // (
            batch_shards(self.mesh) * self.settings.training.accumulation
        )

    @property
    def sampler_batch_size(self) -> int:
        """Images of a batch of the sampler, rounded up to a multiple of the shards."""
        shards = batch_shards(self.mesh)
        return -(-self.settings.sampling.batch_size // shards) * shards

    def with_images_per_device(self, images: int) -> "PlannedRun":
        """Return the same run with another batch size."""
        size = images * batch_shards(self.mesh) * self.settings.training.accumulation
        data = dataclasses.replace(self.settings.data, batch_size=size)
        return PlannedRun.of(dataclasses.replace(self.settings, data=data), self.topology)

    @functools.cached_property
    def model_flops_per_image(self) -> int:
        """FLOPs of training on one image by the model's definition; of the largest of `data.buckets`."""
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state["params"])
        image = jax.ShapeDtypeStruct((1, *self.components.largest_shape), jnp.float32)
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        return training_flops(self.components.denoise, params, image, number, number)

    def compile(self, lower: "Callable[[PlannedRun], jax.stages.Lowered]") -> CompiledProgram:
        """Compile a program of this run, such as `lower_train_step`.

        Raises:
            JaxRuntimeError: the compiler rejected the program.
        """
        chip = self.topology.chip
        if self.topology.name == THIS or chip is None or not chip.ring:
            return compile_fully(lower(self))
        return compile_without_codegen(
            functools.partial(_lower_in_process, lower, self.settings, self.topology.name)
        )


def lower_train_step(run: PlannedRun) -> jax.stages.Lowered:
    """Lower the run's train step."""
    # The model to distill is not read: it is taken to be as large as the run's.
    distilled = None
    if run.settings.auxiliary.distill_weight:
        distilled = (run.components.model_spec, network_params(run.state["params"]))
    with jax.set_mesh(run.mesh):
        return train_compile.lower_train_step(run.components, run.mesh, run.state, distilled)


def lower_sampler(run: PlannedRun) -> jax.stages.Lowered:
    """Lower the generation of one batch of images with the config's `sampling` settings."""
    mesh = sampling_mesh(run.mesh)
    numbers = jax.ShapeDtypeStruct((run.sampler_batch_size,), jnp.int32, sharding=batch_sharding(mesh))
    params = with_sharding(run.state["params"], mesh)
    # The weaker model of autoguidance is not read: it is at most as large as the model.
    spec = GenerationSpec.of(run.components, weak=run.components.model_spec)
    if spec.evaluations is None:
        raise ConfigError(
            f"unsupported config.sampling.sampler={run.settings.sampling.sampler!r}: only a run tells its"
            " number of steps; expected another sampler for a plan"
        )
    with jax.set_mesh(mesh):
        return generate.lower(
            params,
            labels=numbers,
            seeds=numbers,
            scale=jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)),
            spec=spec,
            **({"weak_params": params} if spec.weak else {}),
        )


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of a tree's shards on one device, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _lower_in_process(
    lower: Callable[[PlannedRun], jax.stages.Lowered], settings: Config, topology: str
) -> jax.stages.Lowered:
    """Lower in another process, to which neither a run nor a lowered program can be pickled."""
    return lower(PlannedRun.of(settings, find_topology(topology)))
