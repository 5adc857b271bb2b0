"""Figures of a case on a chip that need not be there, from its compiled program (docs/guide/plan.md)."""

import dataclasses
import functools
from typing import Any

import jax

from benchmarks.compare.attention import attention, flops_without_estimate
from benchmarks.compare.cases import SAMPLER_STEPS, Case
from dig_jax.components import param_count
from dig_jax.hardware.chips import CHIPS
from dig_jax.hardware.hlo_cost import Counts, count
from dig_jax.hardware.roofline import roofline
from dig_jax.planning.plan import bytes_of_refusal
from dig_jax.planning.planned_run import PlannedRun, bytes_per_device, lower_sampler, lower_train_step
from dig_jax.planning.topology import find_topology

# One chip of each kind.
TOPOLOGIES = {
    **{chip: f"{chip}:1x1" for chip in ("v5e", "v6e")},
    **{chip: f"{chip}:1x1x1" for chip in ("v5p", "tpu7x")},
    **{chip: f"{chip}:1" for chip in ("h100", "h200")},
}


def lower(run: PlannedRun, *, case: Case) -> jax.stages.Lowered:
    """Lower the program of a case; the process that compiles for a TPU calls it."""
    with attention(case, run.topology.chip):
        return (lower_sampler if case.phase == "sample" else lower_train_step)(run)


def row(case: Case, chip: str) -> dict[str, Any]:
    """Return the figures of a case on one chip.

    "bytes" is the memory per device; "milliseconds" are the lower bounds of a step, whose largest is the
    roofline time. A program that the compiler refuses has no times.
    """
    jax.clear_caches()  # two cases may differ only in how attention is traced
    run = PlannedRun.of(case.settings(), find_topology(TOPOLOGIES[chip]))
    about = CHIPS[chip]
    found = {
        **dataclasses.asdict(case),
        "batch": run.settings.data.batch_size,
        "device": chip,
        "kind": "computed",
        "parameters": param_count(run.state["params"]),
        "parameter_bytes": bytes_per_device(run.state["params"]),
        "limit": about.memory / about.devices,
    }
    try:
        program = run.compile(functools.partial(lower, case=case))
    except jax.errors.JaxRuntimeError as error:
        return found | {"bytes": bytes_of_refusal(error)}
    counts = count(program.text)
    if about.network:
        counts.add(Counts(flops_without_estimate(run, case)))
    steps = SAMPLER_STEPS if case.phase == "sample" else 1
    times = roofline(counts, about, list(run.mesh.devices.flat))
    return found | {
        "bytes": sum(program.memory.values()),
        "memory": program.memory,
        "flops": sum(counts.flops.values()) / steps,
        "traffic": counts.bytes / steps,
        "milliseconds": {name: 1e3 * t / steps for name, t in dataclasses.asdict(times).items()},
        "bound": times.bound,
        "images_per_second": found["batch"] * steps / times.seconds,
    }
