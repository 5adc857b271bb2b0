import os

# Four devices on one CPU, for what is sharded; before JAX starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
# With the chips' compilers installed JAX would look for chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
