"""Settings for the whole process: the compilation cache, LLVM."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from jax_options import jax_options

from dig_jax import runtime
from dig_jax.errors import ConfigError, UserError
from dig_jax.testing import mesh_of, tiny_components
from dig_jax.training import compile as train_compile


@pytest.fixture
def cache(tmp_path):
    """An empty compilation cache that keeps every program."""
    with jax_options(
        jax_compilation_cache_dir=None,
        jax_persistent_cache_min_compile_time_secs=0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    ):
        yield tmp_path / "dig_jax" / "compiled"


def test_llvm_looks_up_no_symbols_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.setenv("LLVM_DISABLE_SYMBOLIZATION", "0")
    runtime.disable_llvm_symbolizer()
    assert os.environ["LLVM_DISABLE_SYMBOLIZATION"] == "0"
    monkeypatch.delenv("LLVM_DISABLE_SYMBOLIZATION")
    runtime.disable_llvm_symbolizer()
    assert os.environ["LLVM_DISABLE_SYMBOLIZATION"] == "1"


def test_a_second_start_loads_the_compiled_train_step_and_says_so(cache, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    caplog.set_level(logging.INFO, "dig_jax")
    runtime.enable_compilation_cache()

    def lowered(*_):
        return jax.jit(lambda x: jnp.sin(x) * 3.25).lower(jnp.ones(7))

    monkeypatch.setattr(train_compile, "lower_train_step", lowered)
    for _ in range(2):
        assert train_compile.compile_train_step(tiny_components(), mesh_of(1), {})(jnp.zeros(7)).sum() == 0
    assert list(cache.iterdir())
    first, second = caplog.messages
    assert first.startswith("compiled the train step in ")
    assert second.startswith("loaded the train step from the compilation cache in ")


@pytest.mark.parametrize("directory", ["", "elsewhere"])
def test_jaxs_own_setting_of_the_cache_takes_precedence(cache, directory):
    jax.config.update("jax_compilation_cache_dir", directory)
    runtime.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == directory


class _Interrupted:
    """An object whose deletion is interrupted, which Python cannot raise."""

    def __del__(self):
        raise KeyboardInterrupt


def test_an_interrupt_that_python_drops_is_raised_again(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    runtime.raise_lost_interrupts()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            _Interrupted()
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 30
    assert shown == []


def test_other_exceptions_that_cannot_be_raised_are_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: shown.append(unraisable.exc_type))
    runtime.raise_lost_interrupts()
    monkeypatch.setattr(_Interrupted, "__del__", lambda self: 1 / 0)
    _Interrupted()
    assert shown == [ZeroDivisionError]


def test_the_program_computes_in_float32_whatever_the_environment_says():
    changed = {
        "jax_enable_x64": True,
        "jax_numpy_dtype_promotion": "strict",
        "jax_numpy_rank_promotion": "raise",
    }
    with jax_options(**changed):
        runtime.set_numerics()
        assert (jnp.asarray([0.5, 1.5, 2.5]) + jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu': busy")]
)
def test_a_platform_without_a_device_is_a_user_error(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(
        UserError, match="JAX found no device for JAX_PLATFORMS=cpu: .*; set JAX_PLATFORMS=cpu"
    ):
        runtime.require_devices()


def test_a_second_start_in_a_notebook_cannot_change_the_number_of_cpu_devices():
    jax.devices()
    with (
        pytest.raises(
            ConfigError, match="invalid config.mesh.cpu_devices=3; JAX already runs in this process"
        ),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("XLA_FLAGS", raising=False)
        runtime.prepare_cpu(3)


_FAULTS = """
import resource
from dig_jax.runtime import prepare_cpu
prepare_cpu(1)
import jax, jax.numpy as jnp
x = jnp.ones((4096, 4096))
total = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, x: x + 1, x).sum())
assert total.lower(x).compile().memory_analysis().temp_size_in_bytes >= 2**26

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    total(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(10)))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_buffers_of_more_than_64_mib_stay_in_the_process():
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True)
    # A new buffer of 64 MiB has 16,384 pages.
    assert int(done.stdout) < 1000, done.stderr
