"""Runs a scan per shard: XLA cannot split a kernel, and would gather its operands on every device.

Under a mesh set by `jax.set_mesh` the scan is wrapped in `jax.shard_map`. Batch elements and heads are
independent, so that nothing is exchanged. Which mesh axes split which:

- an axis in explicit mode: as the type of q says;
- an axis in automatic mode: heads if it bears one of the names of `HEAD_AXES`, the batch otherwise, as long
  as the number of heads or batch elements is divisible;
- an axis that is manual already, inside a `jax.shard_map`: nothing, the arrays are a shard's part.
"""

import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_gla.scan import Operands

HEAD_AXES = ("tensor", "model", "heads", "tp")


def per_shard(
    run: Callable[[Operands], tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]], operands: Operands
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Calls `run` on each device's part of the operands, and joins its output and final state.

    Without a mesh, or within one whose axes are all manual or of size 1, it is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Axes of size 1 too: a kernel can be lowered only where all are manual.
    free = {name: kind for name, kind in types.items() if kind != AxisType.Manual}
    if all(mesh.shape[name] == 1 for name in free):
        return run(operands)
    batch, heads = _axes(operands.q, free, mesh.shape)
    specs = Operands(
        *[P(batch, None, heads, None)] * 5,
        norm_weight=P(batch, None),
        initial_state=P(batch, heads, None, None),
        segment_ids=P(batch, None),
    )
    specs = Operands(*(None if x is None else spec for x, spec in zip(operands, specs, strict=True)))
    if AxisType.Explicit in free.values():
        operands = jax.tree.map(jax.sharding.reshard, operands, specs)
    out_specs = (specs.v, P(batch, heads, None, None))
    return jax.shard_map(run, in_specs=(specs,), out_specs=out_specs, axis_names=set(free))(operands)


def _axes(
    q: Float[Array, "b t h k"], free: Mapping[str, AxisType], sizes: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that split the batch, and those that split the heads."""
    spec = jax.typeof(q).sharding.spec

    def explicit(axis: int) -> list[str]:
        names = spec[axis] or ()
        return [name for name in ((names,) if isinstance(names, str) else names) if name in free]

    batch, heads = explicit(0), explicit(2)
    for name, kind in free.items():
        target, length = (heads, q.shape[2]) if name in HEAD_AXES else (batch, q.shape[0])
        if kind == AxisType.Auto and length % math.prod(sizes[other] for other in (*target, name)) == 0:
            target.append(name)
    return tuple(batch), tuple(heads)
