import os

# Four devices on one CPU, which tests of sharding use; set before JAX starts. Tests mostly compile:
# LLVM's optimizations would take as long as everything else.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# Tests neither read nor write the user's caches.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
# If plugins for TPU or GPU are installed, JAX would look for chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
