"""Devices of a topology by name: this machine's devices, or descriptions of devices for a compiler."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from dig_jax.errors import ConfigError, UserError, install_command, one_line, suggest
from dig_jax.hardware.chips import CHIPS, Chip, chip_of_kind

THIS = "this"
_EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1, h100:8x4 (8 on each of 4 hosts), h200:8"
# XLA's GpuTargetConfigProto of a Hopper GPU.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    name: the requested name.
    devices: JAX devices, which may be only descriptions for the compiler.
    chip: their rates; None if unknown.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None

    @property
    def chips(self) -> int:
        """Number of chips."""
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def find_topology(name: str) -> Topology:
    """Return this machine's devices for "this", or a topology such as "v5e:16x16" or "h100:8x4".

    Call it before JAX initializes its backends: for other topologies it restricts JAX to the CPU.

    Raises:
        ConfigError: an unknown name or an unavailable size.
        UserError: the compiler for these chips is not installed.
    """
    if name == THIS:
        return Topology(name, jax.devices(), chip_of_kind(jax.devices()[0].device_kind))
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if match is None or match[1] not in CHIPS:
        kind = name.partition(":")[0]
        hint = "" if kind in CHIPS else suggest(kind, CHIPS)
        raise ConfigError(
            f"unknown --topology={name}{hint}; expected {THIS} (the local devices) or a kind of chip and a"
            f" size, such as {_EXAMPLES}"
        )
    chip, sizes = CHIPS[match[1]], [int(size) for size in match[2].split("x")]
    _require_compiler(chip)
    _hide_local_chips()
    try:
        devices = _gpus(chip, sizes) if chip.network else _tpus(chip, name, sizes)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(f"invalid --topology={name}: {one_line(error)}") from error
    topology = Topology(name, devices, chip)
    if topology.chips != math.prod(sizes):
        raise ConfigError(f"invalid --topology={name}: got {topology.chips} chips from the compiler")
    return topology


def _tpus(chip: Chip, name: str, sizes: list[int]) -> Sequence[Any]:
    # By default the compiler expects hosts with four chips.
    host = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sizes) == 1 else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=name, chip_config_name=chip.config, **host
    ).devices


def _gpus(chip: Chip, sizes: list[int]) -> Sequence[Any]:
    if len(sizes) > 2:
        raise ValueError("invalid number of GPUs; expected PER_HOST or PER_HOSTxHOSTS")
    per_host, hosts = (*sizes, 1)[:2]
    target = _GPU.format(kind=chip.kind, memory=chip.memory, bandwidth=chip.bandwidth)
    return topologies.get_topology_desc(
        platform="cuda", topology=f"{hosts}x1x{per_host}", target_config=target
    ).devices


def _require_compiler(chip: Chip) -> None:
    modules = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12") if chip.network else ("libtpu",)
    if not any(_installed(module) for module in modules):
        raise UserError(
            f"the compiler for {chip.name} is not installed ({' or '.join(modules)}):"
            f" {install_command('compilers')}"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _hide_local_chips() -> None:
    """Keep JAX and the compilers from searching for chips, and from warning that there are none."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    jax.config.update("jax_platforms", "cpu")
