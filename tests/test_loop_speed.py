"""What the loop waits for, and when: with a train step that tells who reads its results."""

import itertools
import logging
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_components import mesh_of, random_params, tiny_components, tiny_settings

from dig_jax import runtime as compilation
from dig_jax.errors import ConfigError
from dig_jax.hardware.chips import CHIPS
from dig_jax.hardware.hlo_cost import count
from dig_jax.hardware.model_flops import training_flops
from dig_jax.hardware.roofline import roofline
from dig_jax.training import train as loop
from dig_jax.training.telemetry import utilization as peak
from dig_jax.training.telemetry.profiler import ProfiledSteps, Profiler, profiled_steps

STEPS = 9


class Result:
    """A number on a device, which tells that it is waited for or read."""

    def __init__(self, value, tell):
        self.value, self.tell = value, tell

    def block_until_ready(self):
        self.tell("waited")
        return self

    def __array__(self, dtype=None, copy=None):
        self.tell("read")
        return np.asarray(self.value)

    def __int__(self):
        self.tell("read")
        return int(self.value)

    __index__ = __int__


def events_of_a_run(tmp_path, patch, profile=None, **fields) -> list[tuple[str, int]]:
    """What happens in which order: (what, number of the step or batch)."""
    events = []
    numbers = {"dispatched": itertools.count(1), "transferred": itertools.count(1)}

    def step(state, batch):
        number = next(numbers["dispatched"])
        events.append(("dispatched", number))

        def result(value):
            return Result(value, lambda what: events.append((what, number)))

        metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "skipped": 0}
        metrics |= {"loss_sum": np.ones(4), "count": np.ones(4)}
        return state | {"step": result(number)}, {name: result(x) for name, x in metrics.items()}

    to_global = loop.to_global

    def transferred(batch, mesh):
        events.append(("transferred", next(numbers["transferred"])))
        return to_global(batch, mesh)

    def noted(what):
        return lambda self, *arguments, **_: events.append((what, arguments[0] if arguments else 0))

    def start(run, abstract, checkpoints):
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract), 0

    patch.setattr(loop, "_start", start)
    patch.setattr(loop, "_compiled_step", lambda run, state: step)
    patch.setattr(loop, "to_global", transferred)
    patch.setattr(loop.Checkpoints, "save", noted("saved"))
    patch.setattr(
        Profiler, "start", lambda self: (noted("trace begins")(self), vars(self).update(_tracing=True))
    )
    patch.setattr(
        Profiler, "stop", lambda self: (noted("trace ends")(self), vars(self).update(_tracing=False))
    )
    patch.setattr(loop.report, "draw_samples", lambda sampler, workdir: None)
    fields = {
        "training__steps": STEPS,
        "logging__every_steps": 3,
        "logging__heldout_every_steps": 0,
        "checkpoint__every_steps": 100,
        "sampling__every_steps": 0,
    } | fields
    loop.train(tiny_settings(**fields), tmp_path, profile)
    return [event for event, _ in itertools.groupby(events)]


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return events_of_a_run(tmp_path_factory.mktemp("run"), patch)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_the_next_batch_is_on_its_way_before_a_step_is_waited_for(events, step):
    assert events.index(("dispatched", step)) < events.index(("transferred", step + 1))
    assert events.index(("transferred", step + 1)) < events.index(("waited", step))


@pytest.mark.parametrize("step", range(3, STEPS + 1))
def test_nothing_reads_or_waits_for_the_step_that_runs(events, step):
    before = events[: events.index(("dispatched", step))]
    assert max(number for what, number in before if what in ("waited", "read")) == step - 2


def test_batches_are_read_as_many_as_there_are_steps(events):
    assert [number for what, number in events if what == "transferred"] == list(range(1, STEPS + 1))


def test_the_next_batch_is_on_its_way_while_a_step_is_saved(tmp_path, monkeypatch):
    events = events_of_a_run(tmp_path, monkeypatch, checkpoint__every_steps=4)
    assert events.index(("transferred", 5)) < events.index(("waited", 4)) < events.index(("saved", 4))
    assert events.index(("saved", 4)) < events.index(("dispatched", 5))


def test_a_report_that_cannot_be_written_is_told_and_ends_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "write_report", lambda workdir: 1 / 0)
    assert ("dispatched", STEPS) in events_of_a_run(tmp_path, monkeypatch)
    assert "report.html cannot be written: ZeroDivisionError: division by zero" in caplog.messages


def test_exactly_the_wanted_steps_are_traced(tmp_path, monkeypatch):
    events = events_of_a_run(tmp_path, monkeypatch, ProfiledSteps(4, 6))
    begins, ends = events.index(("trace begins", 0)), events.index(("trace ends", 0))
    assert [number for what, number in events[begins:ends] if what == "dispatched"] == [4, 5, 6]
    assert ("waited", 3) in events[:begins] and ("waited", 6) in events[begins:ends]


# The profiler.


def test_a_trace_is_written_and_said_how_to_look_at(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dig_jax")
    profiler = Profiler(tmp_path, ProfiledSteps(1, 9), 3, 5)
    assert [step for step in range(1, 9) if profiler.starts(step)] == [4]
    profiler.start()
    jax.block_until_ready(jnp.ones(3) + 1)
    assert [step for step in range(4, 9) if profiler.stops(step)] == [5]
    profiler.stop()
    profiler.close()
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert caplog.messages[0].startswith(f"steps 4-5 are profiled: open {trace} at https://ui.perfetto.dev")


@pytest.mark.parametrize(("done", "last"), [(5, 9), (0, 2)])
def test_the_command_that_goes_on_does_not_profile_what_is_done_or_beyond_the_end(
    tmp_path, caplog, done, last
):
    caplog.set_level(logging.INFO, "dig_jax")
    profiler = Profiler(tmp_path, ProfiledSteps(3, 5), done, last)
    assert not any(profiler.starts(step) or profiler.stops(step) for step in range(1, 9))
    assert caplog.messages == ["nothing is profiled: of steps 3-5 none is left"]


def test_a_trace_ends_with_a_run_that_does_not_reach_its_last_step(tmp_path):
    profiler = Profiler(tmp_path, ProfiledSteps(1, 5), 0, 9)
    profiler.start()
    profiler.close()
    Profiler(tmp_path, ProfiledSteps(1, 5), 0, 9).start()  # raises while another trace is running
    jax.profiler.stop_trace()


@pytest.mark.parametrize("numbers", [[0, 1], [3, 5], [5, 4]])
def test_profiled_steps_are_one_range_counted_from_1(numbers):
    assert profiled_steps(None) is None and profiled_steps(np.array([7])) == ProfiledSteps(7, 7)
    with pytest.raises(ConfigError, match="--profile_steps must be one range of steps"):
        profiled_steps(np.array(numbers))


# The compilation cache.


@pytest.fixture
def cache(tmp_path):
    """A cache of its own, which keeps everything."""
    options = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield tmp_path / "dig_jax" / "compiled"


def test_programs_have_llvm_look_up_no_names_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv("LLVM_DISABLE_SYMBOLIZATION", "0")
    compilation.leave_stacks_without_names()
    assert os.environ["LLVM_DISABLE_SYMBOLIZATION"] == "0"
    monkeypatch.delenv("LLVM_DISABLE_SYMBOLIZATION")
    compilation.leave_stacks_without_names()
    assert os.environ["LLVM_DISABLE_SYMBOLIZATION"] == "1"


def test_the_second_start_loads_what_the_first_compiled_and_says_so(cache, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    caplog.set_level(logging.INFO, "dig_jax")
    compilation.keep_compiled_programs()

    def lowered(*_):
        return jax.jit(lambda x: jnp.sin(x) * 3.25).lower(jnp.ones(7))

    monkeypatch.setattr(loop, "lower_train_step", lowered)
    run = loop._Run(tiny_components(), mesh_of(1), cache, cache, None)
    for _ in range(2):
        assert loop._compiled_step(run, {})(jnp.zeros(7)).sum() == 0
    assert list(cache.iterdir())
    first, second = caplog.messages
    assert first.startswith("the train step is compiled, in")
    assert second.startswith("the train step is loaded, as an earlier start compiled it, in")


@pytest.mark.parametrize("told", ["", "elsewhere"])
def test_jaxs_own_setting_of_the_cache_holds(cache, told):
    jax.config.update("jax_compilation_cache_dir", told)
    compilation.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == told


# Set against the chips' peaks.


@pytest.fixture(scope="module")
def run():
    """(components, mesh of four devices, a compiled step)."""
    x = jnp.ones((64, 64))
    return tiny_components(), mesh_of(4), jax.jit(jnp.matmul).lower(x, x).compile()


def test_shares_are_those_of_the_peaks_that_a_plan_takes(run, monkeypatch, caplog):
    components, mesh, train_step = run
    chip = CHIPS["h200"]
    monkeypatch.setattr(peak, "chip_of_kind", lambda kind: chip)
    caplog.set_level(logging.INFO, "dig_jax")
    with jax.set_mesh(mesh):  # as in the loop
        found = peak.peak_of(*run)
    image, number = jnp.zeros((1, *components.train_source.image_shape)), jnp.zeros(1, int)
    flops = training_flops(components.denoise, random_params(components), image, number, number)
    step = roofline(count(train_step.as_text()), chip, list(mesh.devices.flat))
    assert found.shares(1000.0) == {
        "mfu": pytest.approx(1000 * flops / (4 * chip.flops["bfloat16"])),
        "roofline_share": pytest.approx(1000 / 8 * step.seconds),
    }
    assert caplog.messages == [f"at best a step takes {step.seconds:.3g} s, by the roofline of h200: memory"]


def test_nothing_is_said_of_chips_that_are_not_known(run, caplog):
    caplog.set_level(logging.INFO, "dig_jax")
    assert peak.peak_of(*run).shares(100.0) == {}
    assert not caplog.messages


def test_a_program_that_cannot_be_counted_ends_no_run(run, monkeypatch, caplog):
    def unreadable(state, batch):
        return state

    unreadable.as_text = lambda: 1 / 0
    monkeypatch.setattr(peak, "chip_of_kind", lambda kind: CHIPS["h200"])
    assert set(peak.peak_of(*run[:2], unreadable).shares(100.0)) == {"mfu"}
    assert caplog.messages == ["the roofline cannot be told: ZeroDivisionError: division by zero"]


def test_the_memory_is_the_most_that_any_device_held():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    devices = [device({"peak_bytes_in_use": size * 2**30}) for size in (3, 5, 4)]
    assert peak.peak_memory([*devices, device(None), device({})]) == {"peak_memory_gib": 5.0}
    assert peak.peak_memory([device(None)]) == {}
