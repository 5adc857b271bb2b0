import importlib.metadata
import os
import tempfile

import hypothesis
import pytest

# Four devices on one CPU, which tests of sharding use; set before JAX starts. Tests mostly compile:
# LLVM's optimizations would take as long as everything else, and XLA's fusion emitters half of the rest.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
# XLA aborts on unknown flags, so set these only for a version that is known to have them.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# Tests compile the same small programs again and again; those of one worker, and the processes that they
# start, share a cache. Workers do not share it: JAX does not write an entry at once.
compiled = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Lowering would record the Python stack of each operation.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# If plugins for TPU or GPU are installed, JAX would look for chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The first example compiles, and a busy machine is slow at any.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape what a test captured, because pytest-xdist cannot send names that are not UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report
