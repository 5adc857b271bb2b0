import os

# Four devices on one CPU, for what is sharded; before JAX starts. Tests compile much and compute little:
# LLVM's optimisations take as long as all the rest.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# Nothing is left in the user's caches, nor taken from them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
# With the chips' compilers installed JAX would look for chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
