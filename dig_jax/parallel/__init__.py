"""How arrays lie on the devices."""

from dig_jax.parallel.cpu import prepare_cpu
from dig_jax.parallel.mesh import batch_sharding, make_mesh, replicated, to_global

__all__ = ["batch_sharding", "make_mesh", "prepare_cpu", "replicated", "to_global"]
