"""The benchmark of whole models on a GPU, without a GPU."""

import subprocess
import sys
import time

import jax
import pytest

from benchmarks import gpu_models

COMPILED = "print('COMPILED {\"plan_ms\": 1.0}', flush=True); "
RUN = "assert input() == 'go'; print('a warning'); print('ROW {\"ms\": 2.0}')"


def measured(monkeypatch, scripts, seconds):
    """Return the rows of cases whose processes run Python code."""

    def start(case, environment):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([sys.executable, "-c", scripts[case]], text=True, **options)

    monkeypatch.setattr(gpu_models, "start_child", start)
    return list(gpu_models.measure(range(len(scripts)), time.time() + seconds))


def test_a_case_that_fails_leaves_the_rows_of_the_others(monkeypatch):
    scripts = [COMPILED + RUN, "raise ValueError('no cuDNN')", COMPILED + "1 / 0", COMPILED + RUN]
    first, not_compiled, not_run, last = measured(monkeypatch, scripts, 600)
    assert (first["ms"], first["plan_ms"], last["ms"]) == (2.0, 1.0, 2.0)
    assert "no cuDNN" in not_compiled["error"]
    assert "division by zero" in not_run["error"]


def test_cases_past_the_time_limit_are_rows_too(monkeypatch):
    [row] = measured(monkeypatch, ["import time; time.sleep(600)"], 0.5)
    assert row["error"] == "out of time"
    [row] = measured(monkeypatch, ["not started"], -1)
    assert row["error"] == "out of time"


class Refused:
    """A lowered program that compiles only without Triton's products."""

    def __init__(self, message):
        self.message = message

    def compile(self, options=None):
        if options != {"xla_gpu_enable_triton_gemm": False}:
            raise jax.errors.JaxRuntimeError(self.message)
        return "compiled"


def test_a_product_without_tiles_is_compiled_without_triton():
    compiled, options = gpu_models.compile_program(Refused("Couldn't find output tile sizes that satisfy"))
    assert compiled == "compiled"
    assert options == {"xla_gpu_enable_triton_gemm": False}
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        gpu_models.compile_program(Refused("out of memory"))


def test_every_case_has_its_own_name_and_the_first_group_has_the_train_steps_of_each_recipe():
    names = [case.name for case in gpu_models.CASES]
    assert len(names) == len(set(names))
    for name in ("dig_xl 256 B=64 train meanflow", "dit_xl 256 B=64 train meanflow attention=xla"):
        case = gpu_models.CASES[names.index(name)]
        settings = gpu_models.settings(case)
        assert settings.diffusion.process == "meanflow"
        assert settings.model.flow_map
        assert names.index(name) < gpu_models.GROUP
