"""Run a scan per shard, because XLA cannot partition a kernel and would gather its operands on every device.

Under a mesh set by `jax.set_mesh` a scan is lowered as a `jax.shard_map`. Batch elements and heads are
independent, so no communication is needed. Mesh axes shard the arrays as follows:

- Explicit axes: as in the type of q.
- Auto axes: an axis named in `HEAD_AXES` shards the heads, any other axis the batch, provided that its size
  divides the number of heads or batch elements.
- Manual axes (inside a `jax.shard_map`): not at all, because the arrays are already local.

This happens on lowering, after differentiation and vmap. JAX cannot differentiate a `jax.shard_map` inside
another one that leaves axes automatic, and cannot map over one in some cases.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

HEAD_AXES = ("tensor", "model", "heads", "tp")


def free_axes() -> dict[str, AxisType]:
    """Return the axes of the context mesh that are not manual; none if all their sizes are 1."""
    mesh = jax.sharding.get_abstract_mesh()
    types = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # Include axes of size 1: a kernel can be lowered only if all axes are manual.
    free = {name: kind for name, kind in types.items() if kind != AxisType.Manual}
    return free if any(mesh.shape[name] > 1 for name in free) else {}


@dataclasses.dataclass(frozen=True)
class Partition:
    """How the context mesh shards a scan: its free axes, and those that shard the batch and the heads."""

    axes: Mapping[str, AxisType]
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    @classmethod
    def of(cls, q: ShapedArray) -> "Partition | None":
        """Return the partition of a scan with queries of this type, or None if it is not partitioned."""
        axes, sizes = free_axes(), jax.sharding.get_abstract_mesh().shape
        if not axes:
            return None
        batch, heads = ([name for name in _names(q.sharding.spec[i]) if name in axes] for i in (0, 2))
        for name, kind in axes.items():
            target, length = (heads, q.shape[2]) if name in HEAD_AXES else (batch, q.shape[0])
            if kind == AxisType.Auto and length % math.prod(sizes[other] for other in (*target, name)) == 0:
                target.append(name)
        return cls(axes, tuple(batch), tuple(heads))

    def spec(self, name: str) -> P:
        """Return how an array is sharded: an operand, a result, or the gradient d_... or tangent of one."""
        if name in ("norm_weight", "segment_ids"):
            return P(self.batch, None)
        if name.endswith("_state"):
            return P(self.batch, self.heads, None, None)
        # Saved states are [B, N, V, H * K], other arrays [B, T, H, width].
        return P(self.batch, None, None, self.heads) if name == "states" else P(self.batch, None, self.heads)

    def run(
        self,
        function: Callable[..., Sequence[Shaped[Array, "..."]]],
        arrays: Sequence[Shaped[Array, "..."]],
        names: Sequence[str],
        results: Sequence[str],
        types: Sequence[ShapedArray],
    ) -> list[Shaped[Array, "..."]]:
        """Return `function(*arrays)`, run on every device's shard.

        Args:
            function: takes and returns the arrays of one shard.
            arrays: the global arrays.
            names, results: what the arrays and the results of `function` are (see `spec`).
            types: the types of the global results.
        """
        specs, out_specs = ([self.spec(name) for name in group] for group in (names, results))
        explicit = AxisType.Explicit in self.axes.values()

        def run_shard(*arrays: Shaped[Array, "..."]) -> tuple:
            return tuple(map(self._sum, function(*varying_alike(arrays)), out_specs))

        if explicit:
            arrays = [
                jax.sharding.reshard(x, self._explicit(spec)) for x, spec in zip(arrays, specs, strict=True)
            ]
        shards = jax.shard_map(
            run_shard, in_specs=tuple(specs), out_specs=tuple(out_specs), axis_names=set(self.axes)
        )
        values = shards(*arrays)
        if explicit:
            values = [
                jax.sharding.reshard(x, type.sharding.spec) for x, type in zip(values, types, strict=True)
            ]
        return list(values)

    def _sum(self, x: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
        """Sum a gradient over the axes that do not shard its array: each shard has a part of it."""
        sharded = {name for entry in spec for name in _names(entry)}
        axes = tuple(name for name in self.axes if name in _varying(x) and name not in sharded)
        return jax.lax.psum(x, axes) if axes else x

    def _explicit(self, spec: P) -> P:
        """Return the part of a spec that belongs to the types of arrays."""
        return P(*(tuple(n for n in _names(entry) if self.axes[n] == AxisType.Explicit) for entry in spec))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _varying(x: Shaped[Array, "..."]) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def varying_alike(arrays: Sequence[Shaped[Array, "..."]]) -> list[Shaped[Array, "..."]]:
    """Inside `jax.shard_map`, make all arrays vary over the same mesh axes, as its checks require."""
    axes = frozenset().union(*map(_varying, arrays))
    return [
        jax.lax.pcast(x, tuple(axes - _varying(x)), to="varying") if axes - _varying(x) else x for x in arrays
    ]


def without_explicit_axes(
    function: Callable[..., list[Shaped[Array, "..."]]], types: Sequence[ShapedArray]
) -> Callable[..., list[Shaped[Array, "..."]]]:
    """Return `function` as one in which XLA shards arrays, and whose results have these types."""
    if AxisType.Explicit not in free_axes().values():
        return function
    automatic: Any = jax.sharding.auto_axes
    return automatic(function, out_sharding=[type.sharding.spec for type in types])


def merge_axes(x: Shaped[Array, "..."], mapped: Sequence[str]) -> Shaped[Array, "..."]:
    """Merge the two leading axes. They keep their explicit mesh axes; `mapped` shards the first one."""
    first, second, *rest = jax.typeof(x).sharding.spec
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return _reshape(x, shape, P((*(mapped or _names(first)), *_names(second)), *rest))


def split_axis(
    x: Shaped[Array, "..."], size: int, inner: bool, mapped: Sequence[str]
) -> Shaped[Array, "..."]:
    """Split an axis of `size` off the leading one: inside it or, sharded by `mapped`, before it."""
    first, *rest = jax.typeof(x).sharding.spec
    outer = x.shape[0] // size
    if inner:
        return _reshape(x, (outer, size, *x.shape[1:]), P(first, None, *rest))
    kept = tuple(name for name in _names(first) if name not in mapped)
    return _reshape(x, (size, outer, *x.shape[1:]), P(tuple(mapped), kept, *rest))


def _reshape(x: Shaped[Array, "..."], shape: tuple[int, ...], spec: P) -> Shaped[Array, "..."]:
    explicit = AxisType.Explicit in free_axes().values()
    return jax.lax.reshape(x, shape, out_sharding=spec if explicit else None)
