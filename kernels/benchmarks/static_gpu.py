"""Static cost of the GPU kernels, from the CUDA compilers, without a GPU.

    python kernels/benchmarks/static_gpu.py [--write] [--gpus sm_90a sm_80] [--only WORDS]

This compiles the kernels ahead of time (see `gpu_compiler` for the required packages), assembles the PTX that
XLA dumps, and prints for every kernel: registers, bytes of spills (stores and loads), shared memory, SASS
instructions (in total, and in the loop over chunks in the fast form, without inner loops over tokens), the
instructions that spill there, tensor-core instructions, 128-bit loads and all loads, and the bytes of
operands and results per token-head.

`--write` records the figures in static_gpu.json. A test compares the kernels with this file.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import gpu_compiler
import jax
import jax.numpy as jnp
import sass_schedule

RECORD = pathlib.Path(__file__).with_suffix(".json")
DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `kind` is forward, forward+states (as in training), backward or tangent; K = 32, V = 64."""

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
        """The key in static_gpu.json."""
        op = "gated_gla_2d" if self.gated else "gla"
        size = f"B={self.batch} T={self.side**2} H={self.heads}"
        return f"{self.gpu} {op} {self.kind} {self.dtype} {size} {self.direction}"


def all_cases(gpu: str) -> list[Case]:
    """Return all recorded cases."""
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
    cases += [
        Case(gpu, "tangent", direction=direction, gated=gated)
        for gated in (False, True)
        for direction in ("row", "column")
    ]
    return cases + [Case(gpu, kind, dtype="float32") for kind in kinds[1:]]


def compiler_changed() -> str | None:
    """Return how the installed compilers differ from the recorded ones, or None if they are equal."""
    recorded, here = json.loads(RECORD.read_text())["compilers"], gpu_compiler.versions()
    return None if here == recorded else f"compiled with {here}, recorded with {recorded}"


def regressions(measured: dict[str, dict[str, dict[str, float]]], tolerance: float = 0.05) -> list[str]:
    """Return the figures that differ from the record by more than a tolerance, as text.

    `measured` maps the name of a case to the result of `measure`. Spills may differ by 8 more,
    because the same ptxas allocates registers differently from run to run.
    """
    record = json.loads(RECORD.read_text())
    return [
        f"{name}: {kernel}: {key} is {value}, was {was}"
        for name, kernels in measured.items()
        for kernel, figures in kernels.items()
        for key, value in figures.items()
        for was in [record[name][kernel][key]]
        if abs(value - was) > tolerance * was + (8 if "spills" in key else 0)
    ]


def main() -> None:
    """Measure the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--gpus", nargs="*", default=("sm_90a", "sm_80"), choices=[*gpu_compiler.GPUS])
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must contain")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for case in itertools.chain.from_iterable(map(all_cases, arguments.gpus)):
        if not all(word in case.name.split() for word in arguments.only):
            continue
        record[case.name] = measure(case)
        print(case.name)
        for kernel, figures in record[case.name].items():
            words = (f"{key} {value}" for key, value in figures.items())
            print(f"    {kernel:20}", *words, flush=True)
    if arguments.write:
        record["compilers"] = gpu_compiler.versions()
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def measure(case: Case) -> dict[str, dict[str, float]]:
    """Compile one case; return the figures of every kernel in it, by name."""
    program = compile_case(case)
    tokens = case.batch * case.side**2 * case.heads
    sizes = kernel_bytes(program.hlo)
    return {
        name: assemble(kernel.ptx, case.gpu)
        | {"shared": kernel.shared, "bytes": round(sizes[name] / tokens, 1)}
        for name, kernel in program.kernels.items()
    }


def compile_case(case: Case) -> gpu_compiler.CompiledProgram:
    """Compile a case for its GPU."""
    from pallas_gla.scan import Gating, Operands, Scan, saved_shape
    from pallas_gla.triton import backend

    batch, tokens, heads = case.batch, case.side**2, case.heads

    def array(*shape: int, dtype: str = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    keys, values = array(batch, tokens, heads, 32), array(batch, tokens, heads, 64)
    gates = (values, array(batch, 64)) if case.gated else ()
    operands = Operands(keys, keys, values, keys, *gates)
    scan = Scan(32**-0.5, (case.side,) * 2, case.direction, gating=Gating(16.0, 1e-6) if case.gated else None)
    if case.kind == "backward":
        shape, dtype = saved_shape(operands, scan)
        arguments = (array(*shape, dtype=dtype), values, array(batch, heads, 32, 64, dtype="float32"))

        def function(operands, *rest):
            return backend.backward(operands, *rest, scan)
    elif case.kind == "tangent":
        arguments = (operands,)

        def function(operands, tangents):
            return backend.tangent(operands, tangents, scan)
    else:
        arguments = ()

        def function(operands):
            return backend.forward(operands, scan, save="states" in case.kind)

    return gpu_compiler.compile_for(case.gpu, function, operands, *arguments)


def assemble(ptx: str, gpu: str) -> dict[str, int]:
    """Return the figures of a kernel that ptxas and nvdisasm report."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        command = [gpu_compiler.tool("ptxas"), "-v", f"-arch={gpu}", "/dev/stdin", "-o", binary.name]
        report = subprocess.run(command, check=True, input=ptx, capture_output=True, text=True).stderr
        command = [gpu_compiler.tool("nvdisasm"), "-c", "-hex", binary.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code: list[sass_schedule.Instruction] = []
    labels: dict[str, int] = {}
    for item in sass_schedule.instructions(sass):
        if isinstance(item, str):
            labels[item] = len(code)
        else:
            code.append(item)

    def count(pattern: str, code: list[sass_schedule.Instruction] = code) -> int:
        return sum(bool(re.search(pattern, instruction.text)) for instruction in code)

    loop = fast_loop(code, labels)
    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "instructions": len(code),
        "loop": len(loop),
        "loop_spills": count(r"\b(STL|LDL)\b", loop),
        "loop_barriers": count(r"\bBAR\b", loop),
        "loop_cycles": sass_schedule.cycles(loop),
        "wgmma": count(r"\bHGMMA"),
        "mma": count(r"\bHMMA"),
        "loads_128": count(r"LDG(?:STS)?\.E\.(?:BYPASS\.)?(?:LTC128B\.)?128"),
        "loads": count(r"\bLDG(?:STS)?\."),
    }


def fast_loop(
    code: list[sass_schedule.Instruction], labels: dict[str, int]
) -> list[sass_schedule.Instruction]:
    """Return the first loop with tensor cores, without its inner loops that use none.

    It runs the chunks in the fast form; a loop in the slow form may follow.
    """
    branches = [(i, re.search(r"\bBRA\b.*?(\.L_\w+)", x.text)) for i, x in enumerate(code)]
    loops = [(labels.get(found.group(1), i), i) for i, found in branches if found]
    loops = [(first, last) for first, last in loops if first < last]
    tensor = [i for i, x in enumerate(code) if re.search(r"\bHG?MMA", x.text)]

    def uses_tensor_cores(loop: tuple[int, int]) -> bool:
        return any(loop[0] <= i <= loop[1] for i in tensor)

    largest_first = sorted(filter(uses_tensor_cores, loops), key=lambda loop: (loop[0], -loop[1]))
    start, end = largest_first[0] if largest_first else (0, len(code) - 1)
    skipped = set()
    for first, last in loops:
        if start <= first and last <= end and not uses_tensor_cores((first, last)):
            skipped.update(range(first, last + 1))
    return [x for i, x in enumerate(code[start : end + 1], start) if i not in skipped]


def kernel_bytes(hlo: str) -> dict[str, int]:
    """Return the bytes of operands and results of every kernel in an optimized module."""
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
