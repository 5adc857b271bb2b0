"""Compiles for NVIDIA GPUs ahead of time, without a GPU.

Requires jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-nvdisasm.
"""

import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Compute capability, cores, shared memory per core and per block, bytes per second and bytes of memory.
GPUS = {
    "sm_90a": ("NVIDIA H200", 9, 0, 132, 233472, 232448, 4.8e12, 151397597184),
    "sm_80": ("NVIDIA A100", 8, 0, 108, 167936, 166912, 1.555e12, 42505273344),
    "sm_60": ("Tesla P100-PCIE-16GB", 6, 0, 56, 65536, 49152, 7.32e11, 17071734784),
    "sm_70": ("Tesla V100-SXM2-16GB", 7, 0, 80, 98304, 98304, 9e11, 16945512448),
    "sm_75": ("Tesla T4", 7, 5, 40, 65536, 65536, 3.2e11, 15843721216),
    "sm_86": ("NVIDIA GeForce RTX 3090", 8, 6, 82, 102400, 101376, 9.36e11, 25438126080),
    "sm_89": ("NVIDIA L4", 8, 9, 58, 102400, 101376, 3e11, 23580639232),
    "sm_100": ("NVIDIA B200", 10, 0, 148, 233472, 232448, 8e12, 191503990784),
    "sm_120": ("NVIDIA GeForce RTX 5090", 12, 0, 170, 102400, 101376, 1.79e12, 34189869056),
}
TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_core} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: 41943040 clock_rate_ghz: 1.4
  device_memory_size: {memory} shared_memory_per_block_optin: {shared_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
# The default optimization level for GPU programs, whatever XLA_FLAGS say. From JAX 0.11 on XLA dumps PTX only
# for the requested emitters.
OPTIONS = {"xla_backend_optimization_level": 3, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*"}
# Skip the plugin's search for libraries that only a GPU needs. Skip LLVM's symbolization of stack traces in
# Triton's remarks, which takes two thirds of a compilation.
os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "LLVM_DISABLE_SYMBOLIZATION": "1"}


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A compiled kernel: PTX, number of threads, and bytes of shared memory."""

    ptx: str
    threads: int
    shared: int


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled program: its optimized HLO, and our kernels by name."""

    hlo: str
    kernels: dict[str, CompiledKernel]


def target(gpu: str) -> str:
    """Return the description of a GPU for XLA's ahead-of-time compiler."""
    fields = ("name", "major", "minor", "cores", "shared_core", "shared_block", "bandwidth", "memory")
    return TARGET.format(**dict(zip(fields, GPUS[gpu], strict=True)))


def missing() -> str | None:
    """Return which required package is not installed, or None if all are."""
    for module in ("jax_plugins", "jax_plugins.xla_cuda13", "nvidia"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    tools = [name for name in ("ptxas", "nvdisasm") if not _paths(name)]
    return f"{tools[0]} is not installed" if tools else None


def tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit."""
    return _paths(name)[0]


def _paths(name: str) -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    return [path for root in spec.submodule_search_locations for path in glob.glob(f"{root}/*/bin/{name}")]


def versions() -> dict[str, str]:
    """Return the compiler versions that affect a kernel's code."""
    report = subprocess.run([tool("ptxas"), "--version"], check=True, capture_output=True, text=True).stdout
    return {"jaxlib": importlib.metadata.version("jaxlib"), "ptxas": re.search(r"V([\d.]+)", report).group(1)}


@functools.cache
def sharding(gpu: str) -> NamedSharding:
    """Return a sharding on one GPU of this kind."""
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target(gpu))
    return NamedSharding(Mesh(np.array(topology.devices).reshape(1), ("gpu",)), P())


def compile_for(gpu: str, function: Callable[..., Any], *arguments: Any) -> CompiledProgram:
    """Compile `function(*arguments)`; only shapes and dtypes of the arguments matter."""

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(gpu))

    # Kernels that are traced here, not in a lowering rule, find their chip in the context.
    with jax.sharding.use_abstract_mesh(sharding(gpu).mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*jax.tree.map(placed, arguments))
    with tempfile.TemporaryDirectory() as directory:
        lowered.compile(compiler_options=OPTIONS | {"xla_dump_to": directory})
        dump = pathlib.Path(directory)
        thunks, hlo = (
            "".join(path.read_text() for path in dump.glob(f"*{ending}"))
            for ending in ("thunk_sequence.txt", "gpu_after_optimizations.txt")
        )
        kernels = {}
        for ptx in (path.read_text() for path in sorted(dump.glob("*.ptx"))):
            if found := re.search(r"\.entry ((?:gla|selective_scan)_\w+)", ptx):
                name = found.group(1)
                shared = re.search(rf" {name} grid.*shared_memory: (\d+)", thunks).group(1)
                threads = re.search(r"\.reqntid (\d+)", ptx).group(1)
                kernels[name] = CompiledKernel(ptx, int(threads), int(shared))
    return CompiledProgram(hlo, kernels)
