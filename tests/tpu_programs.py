"""Programs for TPUs that another process lowers; few imports, so that it starts fast."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from dig_jax.planning.topology import find_topology


def lower_loop():
    """Matrix products in a loop on four devices, with an all-reduce."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=find_topology("v5e:2x2").devices)
    weights = jax.ShapeDtypeStruct(
        (5, 256, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "data"))
    )
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return jax.jit(lambda x, weights: jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]).lower(
        x, weights
    )


def lower_too_large():
    """A product that needs more than the 15.75 GiB of a v5e."""
    device = SingleDeviceSharding(find_topology("v5e:2x2").devices[0])
    x = jax.ShapeDtypeStruct((1 << 17, 1 << 16), jnp.float32, sharding=device)
    return jax.jit(lambda x: x @ x.T).lower(x)
