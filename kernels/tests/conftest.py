import os
import sys
from pathlib import Path

import pytest

# Four devices on one CPU, for what is sharded; before JAX starts. Tests compile much and compute little:
# LLVM's optimisations take as long as all the rest.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# With the chips' compilers installed JAX would look for chips; JAX_PLATFORMS=cuda or tpu tests on one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The tools whose records the tests compare with.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
pytest.register_assert_rewrite("gla_test_base", "triton_cases")
