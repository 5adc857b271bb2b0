"""Traces of selected steps."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.errors import ConfigError
from dig_jax.training.telemetry.profiler import ProfiledSteps, Profiler, profiled_steps


def test_a_trace_is_written_and_the_log_says_how_to_open_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dig_jax")
    profiler = Profiler(tmp_path, ProfiledSteps(1, 9), 3, 5)
    assert [step for step in range(1, 9) if profiler.starts_at(step)] == [4]
    profiler.start()
    jax.block_until_ready(jnp.ones(3) + 1)
    assert [step for step in range(4, 9) if profiler.stops_at(step)] == [5]
    profiler.stop()
    profiler.close()
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert caplog.messages[0].startswith(f"profiled steps 4-5: open {trace} at https://ui.perfetto.dev")


@pytest.mark.parametrize(("done", "last"), [(5, 9), (0, 2)])
def test_a_start_that_runs_none_of_the_requested_steps_says_so(tmp_path, caplog, done, last):
    caplog.set_level(logging.INFO, "dig_jax")
    profiler = Profiler(tmp_path, ProfiledSteps(3, 5), done, last)
    assert not any(profiler.starts_at(step) or profiler.stops_at(step) for step in range(1, 9))
    expected = f"profiling no steps: got --profile_steps=3-5, but this start runs steps {done + 1}-{last}"
    assert caplog.messages == [expected]


def test_closing_ends_a_trace_whose_last_step_was_not_reached(tmp_path):
    profiler = Profiler(tmp_path, ProfiledSteps(1, 5), 0, 9)
    profiler.start()
    profiler.close()
    Profiler(tmp_path, ProfiledSteps(1, 5), 0, 9).start()  # raises while another trace is running
    jax.profiler.stop_trace()


@pytest.mark.parametrize("numbers", [[0, 1], [3, 5], [5, 4]])
def test_profiled_steps_are_one_range_counted_from_1(numbers):
    assert profiled_steps(None) is None and profiled_steps(np.array([7])) == ProfiledSteps(7, 7)
    with pytest.raises(ConfigError, match="invalid --profile_steps=.*; expected one range of steps"):
        profiled_steps(np.array(numbers))
