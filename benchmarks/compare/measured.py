"""Figures of a case on this machine's first device: the same programs as those that are computed."""

import dataclasses
import statistics
from typing import Any

import jax

from benchmarks.compare.attention import attention
from benchmarks.compare.cases import SAMPLER_STEPS, Case
from benchmarks.gpu_models import sampling_steps, train_steps
from dig_jax.components import param_count
from dig_jax.hardware.hlo_cost import count
from dig_jax.hardware.roofline import roofline
from dig_jax.planning.planned_run import PlannedRun, lower_sampler, lower_train_step
from dig_jax.planning.topology import THIS, find_topology

_REPEATS, _STEPS = 5, 3


def device_name() -> str:
    """Return the kind of this machine's device as one word."""
    return jax.devices()[0].device_kind.replace(" ", "_")


def row(case: Case) -> dict[str, Any]:
    """Return the figures of a case on one device: the median step of five repeats, and the peak of memory.

    "roofline_share" is the plan's lower bound for the same program / the measured time, on known chips.
    """
    jax.clear_caches()  # two cases may differ only in how attention is traced
    topology = dataclasses.replace(find_topology(THIS), devices=jax.devices()[:1])
    run = PlannedRun.of(case.settings(), topology)
    is_train = case.phase != "sample"
    with attention(case, topology.chip, absent=False):
        compiled = (lower_train_step if is_train else lower_sampler)(run).compile()
    steps = (train_steps if is_train else sampling_steps)(compiled, run)
    steps(1)
    times = [steps(_STEPS) for _ in range(_REPEATS)]
    seconds = statistics.median(times)
    memory = compiled.memory_analysis()
    found = {
        **dataclasses.asdict(case),
        "batch": case.images,
        "device": device_name(),
        "kind": "measured",
        "parameters": param_count(run.state["params"]),
        "bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "step_milliseconds": [1e3 * t for t in times],
        "images_per_second": case.images / seconds,
    }
    if stats := jax.devices()[0].memory_stats():
        found["peak_bytes"] = stats["peak_bytes_in_use"]  # of the process so far
    if topology.chip is not None:
        bound = roofline(count(compiled.as_text()), topology.chip, list(run.mesh.devices.flat)).seconds
        found["roofline_share"] = bound / (1 if is_train else SAMPLER_STEPS) / seconds
    return found
