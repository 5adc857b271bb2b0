"""Static cost of the selective scan's kernels, from the chips' compilers, without a chip.

    python kernels/benchmarks/static_selective_scan.py [--chips v5e v6e sm_90a] [--json]

It compiles the forward kernel, as in training, and the backward kernel in bfloat16 at the width of
DiS-1152x64, and prints for each: bytes of HBM per token and channel and their ratio to the minimum, spilled
registers (on GPUs bytes), and on TPUs the bundles (issue cycles) of the loops over eight tokens of a block.
"""

import argparse
import functools
import json
import pathlib
import re
import tempfile
from typing import Any

import static_tpu
from hbm_bytes import hbm_bytes

BATCH, TOKENS, CHANNELS, STATES = 8, 4096, 2304, 16
KINDS = ("forward", "backward")
# Bytes per token and channel in bfloat16: x, dt, z and y; with gradients of the first three in the backward
# pass, where y's gradient takes the place of y. B, C and the saved states are not counted.
MINIMUM = {"forward": 2 * 4, "backward": 2 * 7}


def arrays(make: Any) -> list[Any]:
    """Return x, dt, z and y's gradient, B and C, A and D, then saved states, from `make(shape, dtype)`."""
    from pallas_gla.selective_scan.scan import num_chunks

    wide, narrow = (BATCH, TOKENS, CHANNELS), (BATCH, TOKENS, STATES)
    shapes = [(wide, "bfloat16")] * 4 + [(narrow, "bfloat16")] * 2
    states = (BATCH, num_chunks(TOKENS), STATES, CHANNELS)
    shapes += [(shape, "float32") for shape in ((CHANNELS, STATES), (CHANNELS,), states)]
    return [make(*shape) for shape in shapes]


def function(
    kind: str, x: Any, dt: Any, z: Any, d_y: Any, b: Any, c: Any, a: Any, d: Any, states: Any
) -> Any:
    """Return what a training step computes: the output and saved states, or the gradients."""
    import jax.numpy as jnp
    from pallas_gla.selective_scan import primitive
    from pallas_gla.selective_scan.scan import Operands, Options

    state = jnp.zeros((BATCH, STATES, CHANNELS), jnp.float32)
    operands = Operands(x, dt, a.T, b, c, d, z, state)
    if kind == "forward":
        return primitive.forward(operands, Options(), save=True)
    return primitive.backward(operands, states, d_y, state, Options())


def traffic(hlo: str, kind: str) -> dict[str, float]:
    """Return the bytes that a program moves per token and channel, and their ratio to the minimum."""
    moved = hbm_bytes(hlo) / (BATCH * TOKENS * CHANNELS)
    return {"bytes": round(moved, 2), "bytes_to_minimum": round(moved / MINIMUM[kind], 3)}


def measure_tpu(chip: str, kind: str, dump: str) -> dict[str, float]:
    """Compile a kernel for a TPU and read its schedule."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    topology = topologies.get_topology_desc(platform="tpu", topology_name=static_tpu.CHIPS[chip][0])
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))

    def row_major(x: Any) -> Format:
        return Format(Layout(major_to_minor=tuple(range(x.ndim))), NamedSharding(mesh, P()))

    def make(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        x = jax.ShapeDtypeStruct(shape, dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_major(x))

    path = pathlib.Path(dump)
    for file in path.iterdir():
        file.unlink()
    call, given = functools.partial(function, kind), arrays(make)
    formats = jax.tree.map(row_major, jax.eval_shape(call, *given))
    compiled = jax.jit(call, out_shardings=formats).lower(*given).compile()
    name = f"*selective_scan_{kind}"
    bundles = sorted(path.glob(f"{name}*-final_bundles.txt"))[-1].read_text()
    utilization = sorted(path.glob(f"{name}*final_hlo-static-per-bundle-utilization.txt"))[-1].read_text()
    depths = [static_tpu.depth(line) for line in bundles.splitlines() if re.match(r"\s*0x|\s+0 ", line)]
    inner = [index for index, depth in enumerate(depths) if depth > 1]
    units = static_tpu.busy_units(utilization, list(range(len(depths))))
    spills = sum(count for name, count in units.items() if ":" in name)
    return traffic(compiled.as_text(), kind) | {"loop_bundles": len(inner), "spills": spills}


def measure_gpu(chip: str, kind: str) -> dict[str, float]:
    """Compile a kernel for a GPU and read what the assembler reports."""
    import gpu_compiler
    import jax
    import static_gpu

    program = gpu_compiler.compile_for(chip, functools.partial(function, kind), *arrays(jax.ShapeDtypeStruct))
    figures = static_gpu.assemble(program.kernels[f"selective_scan_{kind}"].ptx, chip)
    return traffic(program.hlo, kind) | {name: figures[name] for name in ("registers", "spills")}


def main() -> None:
    """Measure the selected chips."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="*", default=["v5e", "v6e", "sm_90a"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    measured = {}
    with tempfile.TemporaryDirectory() as dump:
        static_tpu.prepare_libtpu(dump)
        for chip in arguments.chips:
            for kind in KINDS:
                gpu = chip.startswith("sm_")
                measured[f"{chip} {kind}"] = measure_gpu(chip, kind) if gpu else measure_tpu(chip, kind, dump)
                if not arguments.json:
                    print(f"{chip} {kind}", measured[f"{chip} {kind}"], flush=True)
    if arguments.json:
        print(json.dumps(measured))


if __name__ == "__main__":
    main()
