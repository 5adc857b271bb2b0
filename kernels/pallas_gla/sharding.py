"""Run a scan per shard, because XLA cannot partition a kernel and would gather its operands on every device.

Under a mesh set by `jax.set_mesh` the scan is wrapped in `jax.shard_map`. Batch elements and heads are
independent, so no communication is needed. Mesh axes shard the arrays as follows:

- Explicit axes: as in the type of q.
- Auto axes: an axis named in `HEAD_AXES` shards the heads, any other axis the batch, provided that its size
  divides the number of heads or batch elements.
- Manual axes (inside a `jax.shard_map`): not at all, because the arrays are already local.
"""

import math
from collections.abc import Callable, Mapping

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from pallas_gla.scan import Operands

HEAD_AXES = ("tensor", "model", "heads", "tp")


def per_shard(
    run: Callable[[Operands], tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]], operands: Operands
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Call `run` on each device's shard of the operands; return the global output and final state.

    Without a mesh, or if all axes are manual or of size 1, this is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Include axes of size 1: a kernel can be lowered only if all axes are manual.
    free = {name: kind for name, kind in types.items() if kind != AxisType.Manual}
    if all(mesh.shape[name] == 1 for name in free):
        return run(operands)
    batch, heads = _axes(operands.q, free, mesh.shape)
    tokens, state, rows = P(batch, None, heads, None), P(batch, heads, None, None), P(batch, None)
    specs = {"norm_weight": rows, "initial_state": state, "segment_ids": rows}
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    specs = {name: specs.get(name, tokens) for name in arrays}
    if AxisType.Explicit in free.values():
        arrays = jax.tree.map(jax.sharding.reshard, arrays, specs)

    def run_shard(arrays: dict[str, Shaped[Array, "..."]]) -> tuple:
        return run(Operands(**arrays))

    return jax.shard_map(run_shard, in_specs=(specs,), out_specs=(tokens, state), axis_names=set(free))(
        arrays
    )


def _axes(
    q: Float[Array, "b t h k"], free: Mapping[str, AxisType], sizes: Mapping[str, int]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the mesh axes that shard the batch and the mesh axes that shard the heads."""
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
