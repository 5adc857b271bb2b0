import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

# Set before JAX starts: four devices on one CPU for sharding, and quick compilation, because tests compile
# much and compute little. XLA's fusion emitters alone take half of a compilation.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
# XLA aborts on unknown flags, so set these only for a version that is known to have them.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# JAX would look for chips if their compilers are installed. Set JAX_PLATFORMS=cuda or tpu to test on one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The tools whose recorded figures the tests check.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
pytest.register_assert_rewrite("gla_test_base", "range_tests", "triton_cases")


@pytest.fixture
def settings(request):
    """Options of JAX for a test, by their name in SETTINGS of its module."""
    import jax  # after the variables above are set

    values = request.module.SETTINGS[request.param]
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
