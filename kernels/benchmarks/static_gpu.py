"""What the CUDA compilers make of the kernels: their static cost, without a GPU.

    python kernels/benchmarks/static_gpu.py [--write] [--gpus sm_90a sm_80] [--only WORDS]

compiles the kernels ahead of time (jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm and
nvidia-cuda-nvdisasm must be installed), assembles the PTX that XLA dumps, and prints for every kernel its
registers, bytes of spills (stores and loads), shared memory, SASS instructions (in all, and in the loop over
chunks, without its inner loops over tokens), tensor-core instructions, loads of 128 bits and of any size, and
the bytes of the launch's operands and results per token-head.
`--write` records the figures in static_gpu.json, against which a test compares.
"""

import argparse
import dataclasses
import glob
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

RECORD = pathlib.Path(__file__).with_suffix(".json")
DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")
# Compute capability, cores, shared memory per core and per block, bytes per second and bytes of memory.
GPUS = {
    "sm_90a": ("NVIDIA H200", 9, 0, 132, 233472, 232448, 4.8e12, 151397597184),
    "sm_80": ("NVIDIA A100", 8, 0, 108, 167936, 166912, 1.555e12, 42505273344),
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


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `kind` is forward, forward+states (what training runs) or backward; K = 32, V = 64."""

    gpu: str
    kind: str
    heads: int = 18
    side: int = 16
    batch: int = 32
    direction: str = "row"
    gated: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """The key of the record."""
        op = "gated_gla_2d" if self.gated else "gla"
        size = f"B={self.batch} T={self.side**2} H={self.heads}"
        return f"{self.gpu} {op} {self.kind} {self.dtype} {size} {self.direction}"


def all_cases(gpu: str) -> list[Case]:
    """The cases of the record."""
    kinds = ("forward", "forward+states", "backward")
    sizes = [(18, 16, 32), (6, 16, 32), (18, 64, 8), (6, 64, 1)]
    cases = [
        Case(gpu, kind, heads, side, batch, gated=gated)
        for gated in (False, True)
        for kind in kinds
        for heads, side, batch in sizes
    ]
    cases += [
        Case(gpu, kind, direction=direction, gated=gated)
        for gated in (False, True)
        for kind in kinds[1:]
        for direction in DIRECTIONS[1:]
    ]
    return cases + [Case(gpu, kind, dtype="float32") for kind in kinds[1:]]


def target(gpu: str) -> str:
    """What XLA is told of a GPU that is not there."""
    fields = ("name", "major", "minor", "cores", "shared_core", "shared_block", "bandwidth", "memory")
    return TARGET.format(**dict(zip(fields, GPUS[gpu], strict=True)))


def missing() -> str | None:
    """Which package is not installed that compiling for a GPU takes; None if all are there."""
    for module in ("jax_plugins", "jax_plugins.xla_cuda13", "nvidia"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    tools = [name for name in ("ptxas", "nvdisasm") if not _tools(name)]
    return f"{tools[0]} is not installed" if tools else None


def _tools(name: str) -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    return [path for root in spec.submodule_search_locations for path in glob.glob(f"{root}/*/bin/{name}")]


def compilers() -> dict[str, str]:
    """The versions on which the figures depend."""
    report = subprocess.run(
        [_tools("ptxas")[0], "--version"], check=True, capture_output=True, text=True
    ).stdout
    return {"jaxlib": importlib.metadata.version("jaxlib"), "ptxas": re.search(r"V([\d.]+)", report).group(1)}


def compiler_changed() -> str | None:
    """How the installed compilers differ from those of the record; None if they do not."""
    recorded, here = json.loads(RECORD.read_text())["compilers"], compilers()
    return None if here == recorded else f"compiled with {here}, recorded with {recorded}"


def regressions(measured: dict[str, dict[str, dict[str, float]]], tolerance: float = 0.05) -> list[str]:
    """What differs from the record by more than a tolerance, of results of `measure` by the case's name."""
    record = json.loads(RECORD.read_text())
    return [
        f"{name}: {kernel}: {key} is {value}, was {was}"
        for name, kernels in measured.items()
        for kernel, figures in kernels.items()
        for key, value in figures.items()
        for was in [record[name][kernel][key]]
        if abs(value - was) > tolerance * was
    ]


def main() -> None:
    """Measures the cases that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--gpus", nargs="*", default=list(GPUS), choices=GPUS)
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must contain")
    parser.add_argument("--json", help="a JSON list of cases to measure; prints JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        # JAX reads these when it is first imported, which is later.
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        os.environ["JAX_PLATFORMS"] = "cpu"
        # From 0.11 on it dumps PTX only of emitters that are asked for.
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_emitter_re=.*"
        if arguments.json:
            cases = [Case(**case) for case in json.loads(arguments.json)]
            print(json.dumps({case.name: measure(case, dump) for case in cases}))
            return
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        for case in itertools.chain.from_iterable(map(all_cases, arguments.gpus)):
            if not all(word in case.name.split() for word in arguments.only):
                continue
            record[case.name] = measure(case, dump)
            print(case.name)
            for kernel, figures in record[case.name].items():
                print(
                    f"    {kernel:20}",
                    " ".join(f"{key} {value}" for key, value in figures.items()),
                    flush=True,
                )
        if arguments.write:
            record["compilers"] = compilers()
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def measure(case: Case, dump: str) -> dict[str, dict[str, float]]:
    """Compiles one case; returns the figures of every kernel in it, by name."""
    for file in pathlib.Path(dump).iterdir():
        file.unlink()
    compile_case(case)
    thunks = "".join(path.read_text() for path in pathlib.Path(dump).glob("*thunk_sequence.txt"))
    kernels = {}
    for ptx in sorted(pathlib.Path(dump).glob("*.ptx")):
        found = re.search(r"\.entry (gla_\w+)", ptx.read_text())
        if found:
            name = found.group(1)
            shared = re.search(rf" {name} grid.*shared_memory: (\d+)", thunks).group(1)
            kernels[name] = assemble(ptx, case.gpu) | {"shared": int(shared)}
    tokens = case.batch * case.side**2 * case.heads
    hlo = "".join(path.read_text() for path in pathlib.Path(dump).glob("*gpu_after_optimizations.txt"))
    for name, size in kernel_bytes(hlo).items():
        kernels[name]["bytes"] = round(size / tokens, 1)
    return kernels


def compile_case(case: Case) -> None:
    """Compiles a case for its GPU."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P
    from pallas_gla import pallas_triton
    from pallas_gla.scan import Gating, Operands, Scan, saved_shape

    options = {"topology": "1x1x1", "target_config": target(case.gpu)}
    topology = topologies.get_topology_desc(platform="cuda", **options)
    sharding = NamedSharding(Mesh(np.array(topology.devices).reshape(1), ("gpu",)), P())
    batch, tokens, heads = case.batch, case.side**2, case.heads

    def array(*shape: int, dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    keys, values = array(batch, tokens, heads, 32), array(batch, tokens, heads, 64)
    gates = (values, array(batch, 64)) if case.gated else ()
    operands = Operands(keys, keys, values, keys, *gates)
    scan = Scan(32**-0.5, (case.side,) * 2, case.direction, gating=Gating(16.0, 1e-6) if case.gated else None)
    if case.kind == "backward":
        shape, dtype = saved_shape(operands, scan)
        arguments = (array(*shape, dtype=dtype), values, array(batch, heads, 32, 64, dtype="float32"))

        def function(operands, *rest):
            return pallas_triton.backward(operands, *rest, scan)
    else:
        arguments = ()

        def function(operands):
            return pallas_triton.forward(operands, scan, save="states" in case.kind)

    jax.jit(function).lower(operands, *arguments).compile()


def assemble(ptx: pathlib.Path, gpu: str) -> dict[str, int]:
    """What ptxas and nvdisasm say of a kernel."""
    binary = ptx.with_suffix(".cubin")
    command = [_tools("ptxas")[0], "-v", f"-arch={gpu}", str(ptx), "-o", str(binary)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    sass = subprocess.run(
        [_tools("nvdisasm")[0], "-c", str(binary)], check=True, capture_output=True, text=True
    ).stdout
    # Address, or the label of a branch's target.
    lines = re.findall(r"^(\.L_\w+):|^\s+/\*([0-9a-f]{4,})\*/\s+(.*)$", sass, re.MULTILINE)
    code = [text for _, address, text in lines if address]
    labels, index = {}, 0
    for label, address, _ in lines:
        if label:
            labels[label] = index
        elif address:
            index += 1

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for text in code)

    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "instructions": len(code),
        "loop": loop_size(code, labels),
        "wgmma": count(r"\bHGMMA"),
        "mma": count(r"\bHMMA"),
        "loads_128": count(r"LDG\.E\.128"),
        "loads": count(r"\bLDG\."),
    }


def loop_size(code: list[str], labels: dict[str, int]) -> int:
    """Instructions of the longest loop, less those of the loops in it without tensor-core instructions."""
    branches = [(i, re.search(r"\bBRA\b.*?(\.L_\w+)", text)) for i, text in enumerate(code)]
    loops = [(labels.get(found.group(1), i), i) for i, found in branches if found]
    loops = [(first, last) for first, last in loops if first < last]
    start, end = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, len(code) - 1))
    inner = sorted(loop for loop in loops if start <= loop[0] and loop[1] <= end and loop != (start, end))
    tensor = [i for i, text in enumerate(code) if re.search(r"\bHG?MMA", text)]
    skipped = set()
    for first, last in inner:
        if not any(first <= i <= last for i in tensor):
            skipped.update(range(first, last + 1))
    return end - start + 1 - len(skipped)


def kernel_bytes(hlo: str) -> dict[str, int]:
    """Bytes of the operands and results of every kernel in an optimised module."""
    widths = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4}

    def size(text: str) -> int:
        shapes = re.findall(r"\b(bf16|f16|f32|s32)\[([\d,]*)\]", text)
        return sum(widths[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes)

    calls = re.findall(
        r" = (.*?) custom-call\(.*?operand_layout_constraints=\{(.*?)\}, api.*?/(gla_\w+)/pallas_call", hlo
    )
    return {name: size(results) + size(operands) for results, operands, name in calls}


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    main()
