"""What the training loop waits for, and when, by a train step that reports reads of its results."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.parallel import batch_sharding, replicated, to_global
from dig_jax.testing import mesh_of, tiny_components, tiny_settings
from dig_jax.training import hooks, loop, train
from dig_jax.training.run import Run
from dig_jax.training.telemetry.profiler import ProfiledSteps, Profiler
from dig_jax.training.telemetry.step_meter import StepMeter
from dig_jax.training.telemetry.utilization import BestTimes

STEPS = 9


class Result:
    """A number on a device that reports when it is waited for or read."""

    def __init__(self, value, report):
        self.value, self.report = value, report

    def block_until_ready(self):
        self.report("waited")
        return self

    def __array__(self, dtype=None, copy=None):
        self.report("read")
        return np.asarray(self.value)

    def __int__(self):
        self.report("read")
        return int(self.value)

    __index__ = __int__


def events_of_a_run(tmp_path, patch, profile=None, **fields) -> list[tuple[str, int]]:
    """The events of a run in order: (event, number of the step or batch)."""
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

    def transferred(batch, mesh):
        events.append(("transferred", next(numbers["transferred"])))
        return to_global(batch, mesh)

    def record(what):
        return lambda self, *arguments, **_: events.append((what, arguments[0] if arguments else 0))

    def first_state(run, abstract, checkpoints):
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract), 0

    patch.setattr(train, "first_state", first_state)
    patch.setattr(train, "compile_train_step", lambda *_: step)
    patch.setattr(train, "best_times", lambda components, mesh, train_step: BestTimes())
    patch.setattr(loop, "to_global", transferred)
    patch.setattr(train.Checkpoints, "save", record("saved"))
    patch.setattr(
        Profiler, "start", lambda self: (record("trace begins")(self), vars(self).update(_tracing=True))
    )
    patch.setattr(
        Profiler, "stop", lambda self: (record("trace ends")(self), vars(self).update(_tracing=False))
    )
    patch.setattr(hooks, "draw_samples", lambda sampler, workdir: None)
    fields = {
        "training__steps": STEPS,
        "logging__every_steps": 3,
        "logging__heldout_every_steps": 0,
        "checkpoint__every_steps": 100,
        "sampling__every_steps": 0,
    } | fields
    train.train(tiny_settings(**fields), tmp_path, profile)
    return [event for event, _ in itertools.groupby(events)]


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return events_of_a_run(tmp_path_factory.mktemp("run"), patch)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_the_next_batch_is_transferred_before_a_step_is_waited_for(events, step):
    assert events.index(("dispatched", step)) < events.index(("transferred", step + 1))
    assert events.index(("transferred", step + 1)) < events.index(("waited", step))


@pytest.mark.parametrize("step", range(3, STEPS + 1))
def test_the_running_step_is_neither_read_nor_waited_for(events, step):
    before = events[: events.index(("dispatched", step))]
    assert max(number for what, number in before if what in ("waited", "read")) == step - 2


def test_one_batch_is_read_per_step(events):
    assert [number for what, number in events if what == "transferred"] == list(range(1, STEPS + 1))


def test_the_next_batch_is_transferred_while_a_step_is_saved(tmp_path, monkeypatch):
    events = events_of_a_run(tmp_path, monkeypatch, checkpoint__every_steps=4)
    assert events.index(("transferred", 5)) < events.index(("waited", 4)) < events.index(("saved", 4))
    assert events.index(("saved", 4)) < events.index(("dispatched", 5))


def test_exactly_the_requested_steps_are_traced(tmp_path, monkeypatch):
    events = events_of_a_run(tmp_path, monkeypatch, ProfiledSteps(4, 6))
    begins, ends = events.index(("trace begins", 0)), events.index(("trace ends", 0))
    assert [number for what, number in events[begins:ends] if what == "dispatched"] == [4, 5, 6]
    assert ("waited", 3) in events[:begins] and ("waited", 6) in events[begins:ends]


class Reads(hooks.Hook):
    """A hook that calls a function of the state in every phase of a step."""

    def __init__(self, read):
        self.read, self.closed = read, False

    def after_step(self, event):
        self.read(event.state)

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def plain_step():
    """(mesh, state, step): a compiled step on four devices without a network."""
    mesh = mesh_of(4)
    state = {"step": jax.device_put(jnp.int32(0), replicated(mesh))}
    batch = {"image": jax.ShapeDtypeStruct((8, 4, 4, 1), jnp.float32, sharding=batch_sharding(mesh))}

    def step(state, batch):
        metrics = {"loss": batch["image"].mean(), "skipped": jnp.float32(0)}
        return {"step": state["step"] + 1}, metrics

    shardings = ({"step": replicated(mesh)}, dict.fromkeys(("loss", "skipped"), replicated(mesh)))
    return mesh, state, jax.jit(step, out_shardings=shardings).lower(state, batch).compile()


def run_loop(tmp_path, plain_step, train_step, *run_hooks):
    mesh, state, _ = plain_step
    run = Run(tiny_components(training__steps=3), mesh, tmp_path, tmp_path)
    return loop.loop(run, train_step, state, 0, run_hooks, StepMeter(8))


def test_the_loop_runs_without_implicit_transfers_and_hooks_may_read(tmp_path, plain_step):
    steps, compiled = [], plain_step[2]
    hook = Reads(lambda state: steps.append(int(state["step"])))
    state = run_loop(tmp_path, plain_step, lambda state, batch: compiled(state, images(batch)), hook)
    assert steps == [1, 2, 3] and state["step"] == 3 and hook.closed


@pytest.mark.parametrize(
    "before_step",
    [
        lambda state, batch: (state, jax.device_get(batch)),
        lambda state, batch: (state, batch, state["step"] + 1),
    ],
    ids=["numpy array", "Python number"],
)
def test_an_implicit_transfer_in_a_step_is_an_error(tmp_path, plain_step, before_step):
    def step(state, batch):
        return plain_step[2](*before_step(state, images(batch))[:2])

    hook = Reads(lambda state: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        run_loop(tmp_path, plain_step, step, hook)
    assert hook.closed


def images(batch):
    return {"image": batch["image"]}
