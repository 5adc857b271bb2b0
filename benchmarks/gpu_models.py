"""Times whole models on one GPU: a train step and a guided sampling step of DiG-XL/2 and DiT-XL/2.

    python benchmarks/gpu_models.py --out=DIR [--only WORDS]

The settings are the recipes `ours` and `meanflow` of configs/dig_xl.py and dit_xl.py with random images.
Every case runs in its own process, so that its peak memory is its own. Four cases compile at the same time;
then one after the other runs alone. DIR/gpu_models.json gets a row per case: the measured step, the plan's
lower bound for the same compiled program, and the memory of both. DiT uses cuDNN's flash attention, or plain
JAX with "xla", which is the only one with a derivative in forward mode, as `meanflow` needs.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A child waits for this line before it runs.
GO = "go\n"


@dataclasses.dataclass(frozen=True)
class Case:
    """A program of a config to time, with its batch size."""

    config: str
    pixels: int
    batch: int
    program: str = "train"
    recipe: str = "ours"
    remat: str = "none"
    attention: str = "cudnn"
    gla: str | None = None
    scan: bool = False

    @property
    def name(self) -> str:
        """One word per field that is not the default."""
        words = [self.config, str(self.pixels), f"B={self.batch}", self.program]
        words += [self.recipe] if self.recipe != "ours" else []
        words += [f"remat={self.remat}"] if self.remat != "none" else []
        words += ["attention=xla"] if self.attention == "xla" else []
        words += [f"gla={self.gla}"] if self.gla else []
        words += ["scan"] if self.scan else []
        return " ".join(words)


MODELS = ("dig_xl", "dit_xl")
# The most valuable first.
CASES = (
    *(Case(config, 256, 64) for config in MODELS),
    Case("dig_xl", 256, 64, recipe="meanflow"),
    Case("dit_xl", 256, 64, recipe="meanflow", attention="xla"),
    *(Case(config, 1024, 4) for config in MODELS),
    *(Case(config, 256, 64, program="sample") for config in MODELS),
    *(Case(config, 1024, 8, program="sample") for config in MODELS),
    Case("dit_xl", 256, 64, attention="xla"),
    Case("dig_xl", 256, 64, gla="xla"),
    *(Case(config, 256, 64, remat="full", scan=True) for config in MODELS),
    Case("dig_xl", 256, 64, scan=True),
)
# Cases that compile at the same time, estimated on 16 cores: the first group in three minutes, others in two.
GROUP = 4
STEPS, SAMPLER_STEPS = 5, 10


def main() -> None:
    """Run all cases and print a table, or run one case as a child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default="gpu_benchmark", help="directory for the record")
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must contain")
    parser.add_argument("--seconds", type=float, default=360, help="time limit; later cases are skipped")
    parser.add_argument("--trace", type=pathlib.Path, help="directory for a profiler trace of every case")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        run_case(CASES[options.case], options.trace)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.time() + options.seconds
    chosen = [i for i, case in enumerate(CASES) if all(word in case.name.split() for word in options.only)]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(chosen), GROUP):
        for row in measure(chosen[start : start + GROUP], end):
            rows.append(row)
            print(line(row), flush=True)
            about = {"command": " ".join(sys.argv), "date": datetime.date.today().isoformat()}
            (options.out / "gpu_models.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def measure(cases: Sequence[int], end: float) -> Iterator[dict[str, Any]]:
    """Compile cases at the same time, run one after the other, and yield their rows until the time `end`."""
    began = time.time()
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "LLVM_DISABLE_SYMBOLIZATION": "1"}
    children = {i: start_child(i, environment) for i in cases if began < end}
    timer = threading.Timer(max(end - began, 0), lambda: [child.kill() for child in children.values()])
    timer.daemon = True
    timer.start()
    compiled = {i: read(child, "COMPILED") for i, child in children.items()}
    print(f"compiled in {time.time() - began:.0f} s", flush=True)
    for i in cases:
        row = compiled.get(i, {"error": "out of time"})
        if "error" not in row:
            row |= run_child(children[i])
        if i in children:
            children[i].kill()  # frees the GPU's memory
            with children[i]:  # closes the pipes
                pass
        yield {"name": CASES[i].name, **dataclasses.asdict(CASES[i]), **row}
    timer.cancel()


def start_child(case: int, environment: dict[str, str]) -> subprocess.Popen:
    """Start the process of a case."""
    return subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], f"--case={case}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def run_child(child: subprocess.Popen) -> dict[str, Any]:
    """Let a compiled case run, and return its row."""
    with contextlib.suppress(BrokenPipeError):  # killed before: the next line returns an error
        os.write(child.stdin.fileno(), GO.encode())
    return read(child, "ROW")


def read(child: subprocess.Popen, word: str) -> dict[str, Any]:
    """Return the JSON after `word` from a child's output, or its last lines as an error."""
    said: list[str] = []
    for text in child.stdout:
        head, _, rest = text.partition(" ")
        if head == word:
            return json.loads(rest)
        said = [*said, text.strip()][-4:]
    return {"error": " | ".join(said)[-600:] or "out of time"}


def line(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    return (
        f"{row['name']:40} {row['ms']:8.1f} ms (plan {row['plan_ms']:.1f}), {row['peak_gib']:.1f} GiB"
        f" (plan {row['plan_gib']:.1f}), MFU {row.get('mfu', 0):.2f}, compiled in {row['compile_s']:.0f} s"
    )


def run_case(case: Case, trace: pathlib.Path | None) -> None:
    """Compile, wait for `GO`, run, and print the results."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import jax

    from dig_jax.models.mixers import gla, softmax
    from dig_jax.planning import planned_run
    from dig_jax.planning.topology import THIS, find_topology

    if case.attention == "xla":
        softmax._implementation = lambda q: None
    if case.gla:
        own = gla.gated_gla_2d
        gla.gated_gla_2d = lambda *args, **options: own(*args, **options | {"implementation": case.gla})
    run = planned_run.PlannedRun.of(settings(case), find_topology(THIS))
    began = time.time()
    lower = planned_run.lower_train_step if case.program == "train" else planned_run.lower_sampler
    lowered = lower(run)
    traced = time.time()
    compiled, options = compile_program(lowered)
    row = {"trace_s": traced - began, "compile_s": time.time() - traced, "options": options}
    row |= planned(compiled, run, 1 if case.program == "train" else SAMPLER_STEPS)
    step = train_steps(compiled, run) if case.program == "train" else sampling_steps(compiled, run)
    print("COMPILED", json.dumps(row), flush=True)
    if sys.stdin.readline() != GO:
        return
    step(2)
    times = [step(STEPS) for _ in range(3)]
    if trace:
        with jax.profiler.trace(str(trace / case.name.replace(" ", "_"))):
            step(1)
    row = {"ms": min(times) * 1e3, "ms_all": [t * 1e3 for t in times]}
    row["peak_gib"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    if case.program == "train":
        peak = run.topology.chip.flops["bfloat16"]
        row["mfu"] = run.model_flops_per_image * case.batch / (min(times) * peak)
    print("ROW", json.dumps(row), flush=True)


def compile_program(lowered: Any) -> tuple[Any, dict[str, bool]]:
    """Return a compiled program and the compiler options: products without Triton if it has no tiles for one.

    XLA finds none for DiT's `meanflow`, at least ahead of time, without a GPU to tune on.
    """
    import jax

    options = {}
    try:
        return lowered.compile(), options
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
    options = {"xla_gpu_enable_triton_gemm": False}
    return lowered.compile(options), options


def settings(case: Case) -> Any:
    """Return the config of a case, with random images."""
    from dig_jax import config
    from dig_jax.planning.plan import without_data

    c = runpy.run_path(str(ROOT / "configs" / f"{case.config}.py"))["get_config"](
        str(case.pixels), case.recipe
    )
    c.data.batch_size = case.batch
    c.model.remat, c.model.scan_layers = case.remat, case.scan
    c.sampling.batch_size, c.sampling.steps = case.batch, SAMPLER_STEPS
    return without_data(config.from_dict(c.to_dict()))


def planned(compiled: Any, run: Any, steps: int) -> dict[str, Any]:
    """Return the plan's figures for a compiled program: lower bound of a step's time, and its memory."""
    from dig_jax.hardware.hlo_cost import count
    from dig_jax.hardware.roofline import roofline

    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    counts = count(compiled.as_text())
    bound = roofline(counts, run.topology.chip, list(run.mesh.devices.flat))
    return {
        "plan_ms": bound.seconds / steps * 1e3,
        "plan_bound": bound.bound,
        "plan_compute_ms": bound.compute / steps * 1e3,
        "plan_memory_ms": bound.memory / steps * 1e3,
        "plan_flops": sum(counts.flops.values()) / steps,
        "plan_bytes": counts.bytes / steps,
        "plan_gib": total / 2**30,
    }


def train_steps(compiled: Any, run: Any) -> Callable[[int], float]:
    """Return a function that runs train steps and returns the seconds of one."""
    import jax
    import jax.numpy as jnp

    from dig_jax.training.compile import abstract_batch
    from dig_jax.training.state import fresh_state

    init = jax.jit(lambda: fresh_state(run.components)).lower().compile()
    shapes = abstract_batch(run.components, run.mesh)
    batch = {
        "image": jax.random.normal(jax.random.key(0), shapes["image"].shape, jnp.float32),
        "label": jnp.arange(shapes["label"].shape[0], dtype=jnp.int32),
    }
    batch = {name: jax.device_put(x, shapes[name].sharding) for name, x in batch.items()}
    states: list[Any] = []

    def run_steps(count: int) -> float:
        state = states.pop() if states else jax.block_until_ready(init())
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        states.append(state)
        return (time.perf_counter() - began) / count

    return run_steps


def sampling_steps(compiled: Any, run: Any) -> Callable[[int], float]:
    """Return a function that draws a batch of images once and returns the seconds of one guided step."""
    import jax
    import jax.numpy as jnp

    from dig_jax.training.state import init_params

    init = jax.jit(lambda: init_params(run.components)).lower().compile()
    numbers = jnp.arange(run.sampler_batch_size, dtype=jnp.int32)
    scale = jnp.float32(run.settings.sampling.guidance_scale)
    params: list[Any] = []

    def run_steps(count: int) -> float:
        del count
        if not params:
            params.append(jax.block_until_ready(init()))
        began = time.perf_counter()
        jax.block_until_ready(compiled(params[0], labels=numbers, seeds=numbers, scale=scale))
        return (time.perf_counter() - began) / SAMPLER_STEPS

    return run_steps


if __name__ == "__main__":
    main()
