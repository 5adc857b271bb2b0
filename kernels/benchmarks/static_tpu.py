"""Static cost of the TPU kernels, from the TPU compiler, without a TPU.

    python kernels/benchmarks/static_tpu.py [--write] [--chips v5e v6e] [--only WORDS]

This compiles the kernels ahead of time (requires libtpu), follows the final schedule of one grid step, and
prints for every case: bundles (issue cycles) per token-head, the time by the chip's clock, the ratio of this
time to the memory floor, register spills and fills per token-head, the busiest unit, the ratio of HBM bytes
to the minimum, and the bundles of the path for any decay. A schedule excludes DMA and stalls.

`--write` records the figures in static_tpu.json. A test compares the kernels with this file.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from hbm_bytes import hbm_bytes

RECORD = pathlib.Path(__file__).with_suffix(".json")
DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")
KEYS, VALUES = 32, 64
# Topology, GHz, bytes per second of HBM. Clocks are those that give the published peak rates; without one no
# time is computed.
CHIPS = {
    "v4": ("v4:2x2x1", None, 1.2e12),
    "v5e": ("v5e:2x2", 1.5, 0.819e12),
    "v5p": ("v5p:2x2x1", None, 2.765e12),
    "v6e": ("v6e:2x2", 1.75, 1.64e12),
    "tpu7x": ("tpu7x:2x2x1", None, 7.37e12),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel: `kind` is forward, forward+states (as in training), backward or tangent; in bfloat16."""

    chip: str
    kind: str = "forward"
    heads: int = 18
    side: int = 64
    direction: str = "row"
    gated: bool = False
    chunks: int | None = None
    batch: int = 8
    implementation: str = "mosaic"

    @property
    def name(self) -> str:
        """The key in static_tpu.json."""
        op = "gated_gla_2d" if self.gated else "gla"
        op = op if self.implementation == "mosaic" else f"{op}({self.implementation})"
        chunks = "" if self.chunks is None else f" NC={self.chunks}"
        return f"{self.chip} {op} {self.kind} H={self.heads} T={self.side**2} {self.direction}{chunks}"

    @property
    def minimum_bytes(self) -> int:
        """Bytes that must cross HBM per token-head: bfloat16, K = 32, V = 64, one state per 64 tokens."""
        narrow, wide, states = 2 * 32, 2 * 64, 2 * 32 * 64 // 64
        gate = wide if self.gated else 0
        if self.kind == "backward":
            return 6 * narrow + 3 * wide + 2 * gate + states
        if self.kind == "tangent":
            return 6 * narrow + 3 * wide + 2 * gate
        return 3 * narrow + 2 * wide + gate + (states if self.kind == "forward+states" else 0)


def main() -> None:
    """Measure the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--chips", nargs="*", default=list(CHIPS))
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must contain")
    parser.add_argument("--json", help="a JSON list of cases to measure; prints JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as dump:
        prepare_libtpu(dump)
        if arguments.json:
            measured = [measure(Case(**case), dump) for case in json.loads(arguments.json)]
            print(json.dumps(measured))
            return
        cases = [case for case in all_cases() if case.chip in arguments.chips]
        cases = [case for case in cases if all(word in case.name.split() for word in arguments.only)]
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        print(
            f"{'case':62} {'bundles':>7} {'ps':>6} {'x floor':>7} {'spills':>6} {'busiest':>12} {'bytes':>6} "
            "any decay"
        )
        for case in cases:
            figures = measure(case, dump)
            record[case.name] = figures
            print(_row(case, figures), flush=True)
            if arguments.write:
                RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def all_cases() -> list[Case]:
    """Return all recorded cases."""
    kinds = ("forward", "forward+states", "backward")
    cases = [Case(chip, kind) for chip in CHIPS for kind in kinds]
    for chip in ("v5e", "v6e"):
        cases += [Case(chip, "forward", direction=d, gated=True) for d in DIRECTIONS]
        cases += [Case(chip, "backward", direction=d, gated=True) for d in ("row", "column")]
        for gated in (False, True):
            cases += [Case(chip, "tangent", direction=d, gated=gated) for d in ("row", "column")]
        cases += [Case(chip, kind, direction="column") for kind in ("forward", "backward")]
        cases += [Case(chip, kind, implementation="xla") for kind in ("forward", "backward")]
        if importlib.util.find_spec("tops"):
            # A peer's kernels, if installed. They have no gradient and hold a whole array in VMEM, so larger
            # batches do not compile.
            cases.append(Case(chip, batch=1, implementation="tops"))
    # These compile quickly, so a test measures them again.
    cases += [
        Case(chip, kind, 6, 16, chunks=1) for chip in CHIPS for kind in ("forward", "backward", "tangent")
    ]
    return cases


def prepare_libtpu(dump: str) -> None:
    """Set the environment of libtpu, which reads it at its start, to dump schedules into a folder."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"


def measure(case: Case, dump: str) -> dict[str, float | str]:
    """Compile one case and read its schedule."""
    dump = pathlib.Path(dump)
    for file in dump.iterdir():
        file.unlink()
    compiled, tiling = compile_case(case)
    per_token = round(hbm_bytes(compiled.as_text()) / (case.batch * case.side**2 * case.heads), 1)
    if case.implementation != "mosaic":
        return {"bytes": per_token}
    bundles = sorted(dump.glob("*gla_*-final_bundles.txt"))[-1].read_text()
    utilization = sorted(dump.glob("*gla_*final_hlo-static-per-bundle-utilization.txt"))[-1].read_text()
    fast, safe = step_bundles(bundles, (tiling.chunks, (tiling.chunk - 1).bit_length()))
    tokens = tiling.chunk * tiling.chunks * tiling.heads
    units = busy_units(utilization, fast)
    spills = sum(units.pop(name) for name in list(units) if ":" in name)
    busiest = max(units, key=units.get)
    return {
        "bundles": round(len(fast) / tokens, 4),
        "any_decay_bundles": round(safe / tokens, 2),
        "spills": round(spills / tokens, 3),
        "busiest": f"{busiest} {100 * units[busiest]:.0f}%",
        "bytes": per_token,
    }


def times_floor(case: Case, figures: dict[str, float | str]) -> float | None:
    """Return the ratio of a schedule's time to the time for `minimum_bytes`, or None without a clock."""
    _, clock, bandwidth = CHIPS[case.chip]
    if clock is None:
        return None
    return figures["bundles"] / clock * 1e-9 / (case.minimum_bytes / bandwidth)


def _row(case: Case, figures: dict[str, float | str]) -> str:
    traffic = f"{figures['bytes'] / case.minimum_bytes:6.2f}"
    if "bundles" not in figures:
        return f"{case.name:62} {'':42} {traffic}"
    floor, clock = times_floor(case, figures), CHIPS[case.chip][1]
    time = "" if clock is None else f"{figures['bundles'] / clock * 1e3:.0f}"
    return (
        f"{case.name:62} {figures['bundles']:7.3f} {time:>6} {'' if floor is None else f'{floor:.2f}':>7} "
        f"{figures['spills']:6.2f} {figures['busiest']:>12} {traffic} {figures['any_decay_bundles']:9.2f}"
    )


def compile_case(case: Case) -> tuple[Any, Any]:
    """Compile a case as a model would call it; return it and its kernel's `TpuTiling`."""
    # libtpu reads the environment when JAX loads it, so JAX is imported here.
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P
    from pallas_gla.mosaic_tpu import tuning

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[case.chip][0])
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    if case.chunks is not None:
        kind = topology.devices[0].device_kind
        limits = {"forward_chunks": case.chunks, "backward_chunks": case.chunks}
        tuning.BLOCKS[kind] = dataclasses.replace(tuning.BLOCKS[kind], **limits)

    def row_major(x: Any) -> Format:
        # The layout of operands and results of a model's matrix products.
        return Format(Layout(major_to_minor=tuple(range(x.ndim))), NamedSharding(mesh, P()))

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        x = jax.ShapeDtypeStruct(shape, dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_major(x))

    batch, tokens = case.batch, case.side**2
    narrow, wide = array(batch, tokens, case.heads * KEYS), array(batch, tokens, case.heads * VALUES)
    arrays = [narrow, narrow, wide, narrow]
    if case.gated:
        arrays += [wide, array(batch, VALUES, dtype=jnp.float32)]
    if case.kind == "backward":
        arrays = [wide, *arrays]
        if case.implementation == "mosaic":
            arrays = [array(batch, -(-tokens // 64), VALUES, case.heads * KEYS), *arrays]
    if case.kind == "tangent":
        arrays = [*arrays, *arrays]
    function, tilings = case_function(case)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        formats = jax.tree.map(row_major, jax.eval_shape(function, *arrays))
        # The peer's largest block exceeds XLA's default limit.
        options = {"xla_tpu_scoped_vmem_limit_kib": "98304"} if case.implementation == "tops" else {}
        compiled = jax.jit(function, out_shardings=formats).lower(*arrays).compile(options)
    return compiled, tilings[-1] if tilings else None


def case_function(case: Case) -> tuple[Callable[..., list[Any]], list[Any]]:
    """Return the function of a case, and a list to which tracing appends the kernel's `TpuTiling`."""
    import jax
    import jax.numpy as jnp
    from pallas_gla import gla
    from pallas_gla.mosaic_tpu import backend, tuning
    from pallas_gla.mosaic_tpu.launch import Launch
    from pallas_gla.scan import Gating, Operands, Scan

    batch, tokens = case.batch, case.side**2
    gating = Gating(16.0, 1e-6) if case.gated else None
    scan = Scan(KEYS**-0.5, (case.side, case.side), case.direction, gating=gating)
    tilings = []

    def operands(q: Any, k: Any, v: Any, g: Any, out_gate: Any = None, norm_weight: Any = None) -> Operands:
        q, k, v, g = (x.reshape(batch, tokens, case.heads, -1) for x in (q, k, v, g))
        return Operands(q, k, v, g, None if out_gate is None else out_gate.reshape(v.shape), norm_weight)

    def flat(*arrays: Any) -> list[Any]:
        return [x.reshape(batch, tokens, -1) if x.shape[:2] == (batch, tokens) else x for x in arrays]

    def forward(*arrays: Any) -> list[Any]:
        scanned = operands(*arrays)
        tilings.append(Launch.of(scanned, scan, tuning.blocks().forward_chunks).tiling)
        o, final_state, states = backend.forward(scanned, scan, save=case.kind == "forward+states")
        return flat(o, final_state, *([] if states is None else [states]))

    def backward(states: Any, d_out: Any, *arrays: Any) -> list[Any]:
        scanned = operands(*arrays)
        tilings.append(Launch.of(scanned, scan, tuning.blocks().backward_chunks).tiling)
        d_state = jnp.zeros((batch, case.heads, KEYS, VALUES), jnp.float32)
        gradients = backend.backward(scanned, states, d_out.reshape(scanned.v.shape), d_state, scan)
        return flat(*(x for x in gradients if x is not None))

    def tangent(*arrays: Any) -> list[Any]:
        primals, dots = (operands(*x) for x in (arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]))
        tilings.append(Launch.of(primals, scan, tuning.blocks().backward_chunks).tiling)
        return flat(*backend.tangent(primals, dots, scan))

    def xla(*arrays: Any) -> Any:
        return gla(*arrays, implementation="xla")

    def xla_forward(*arrays: Any) -> list[Any]:
        return flat(xla(*operands(*arrays)[:4]))

    def xla_backward(d_out: Any, *arrays: Any) -> list[Any]:
        scanned = operands(*arrays)[:4]
        return flat(*jax.vjp(xla, *scanned)[1](d_out.reshape(scanned[2].shape)))

    def peer(*arrays: Any) -> list[Any]:
        from tops.ops.gla import chunk

        chunk.is_tpu_runtime = lambda: True  # without a chip it would interpret its kernels
        return flat(chunk.chunk_gla(*operands(*arrays)[:4], chunk_size=64)[0])

    functions = {
        "mosaic": {"backward": backward, "tangent": tangent},
        "xla": {"forward": xla_forward, "backward": xla_backward},
        "tops": {"forward": peer},
    }
    return functions[case.implementation].get(case.kind, forward), tilings


def step_bundles(text: str, trips: tuple[int, int]) -> tuple[list[int], int]:
    """Return the bundles of a step in the middle of the grid, and the length of the path for any decay.

    The path for any decay has a loop over chunks with inner loops over levels; `trips` are their trip counts.
    """
    weights = {1: 1, 2: trips[0], 3: trips[0] * trips[1]}
    lines = [line for line in text.splitlines() if re.match(r"\s*0x|\s+0 ", line)]
    depths = [depth(line) for line in lines]
    skips = []
    for index, line in enumerate(lines):
        branch = re.search(r"sbr\.rel \(.*?\) target = \$region(\d+)", line)
        if branch and depths[index] == 1:
            ends = [i for i in _landings(lines, branch.group(1)) if i > index]
            if ends:
                skips.append((index, ends[0]))
    # The widest branch skips a whole step, in the pipeline's last iteration. The other branches skip code
    # that does not run in the middle of the grid: for the first step, the last step, and any decay.
    body = max(skips, key=lambda s: s[1] - s[0], default=None)
    inner = [s for s in skips if s != body]
    fast, safe = [], 0
    for index in range(len(lines)):
        inside = [s for s in inner if s[0] + 3 < index < s[1]]
        if depths[index] == 0:
            continue
        if not inside:
            fast.append(index)
        elif any(d > 1 for d in depths[inside[0][0] : inside[0][1]]):
            safe += weights[min(depths[index], 3)]
    return fast, safe


def _landings(lines: list[str], region: str) -> list[int]:
    return [i for i, line in enumerate(lines) if re.search(rf"Start/End empty region {region}\b", line)]


def depth(line: str) -> int:
    """Return the number of loops around a bundle."""
    mark = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(>*)", line)
    return len(mark.group(1)) if mark else 0


def busy_units(text: str, bundles: list[int]) -> dict[str, float]:
    """Return every unit's busy fraction over `bundles`, and the number of spills and fills."""
    head, body = text.split("== UTILIZATION:")
    names = [name.strip() for name in head.splitlines()[1].split(",")]
    capacity = [int(x) for x in head.splitlines()[2].split()]
    rows = [[int(x) for x in line.split()] for line in body.strip().splitlines()]
    used = [sum(rows[i][column] for i in bundles if i < len(rows)) for column in range(len(names))]
    return {
        name: used[c] if ":" in name else used[c] / (capacity[c] * len(bundles))
        for c, name in enumerate(names)
    }


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    main()
