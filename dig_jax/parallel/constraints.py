"""Sharding constraints for the mesh of `jax.set_mesh`; without a mesh they do nothing."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from dig_jax.parallel.mesh import BATCH_AXES

Axes = str | tuple[str, ...] | None


def axis_sizes() -> dict[str, int]:
    """Return the sizes of the current mesh's Auto axes, without axes of size 1."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def fitting(shape: Sequence[int], axes: Sequence[Axes], sizes: Mapping[str, int]) -> P:
    """Return a spec with `axes` for the last dimensions, without absent axes and axes that do not divide."""
    kept: list[Axes] = [None] * len(shape)
    for position in range(-min(len(axes), len(shape)), 0):
        wanted = axes[position] or ()
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        names = [name for name in wanted if sizes.get(name, 1) > 1]
        while names and shape[position] % math.prod(sizes[name] for name in names):
            names.pop()
        if names:
            kept[position] = names[0] if len(names) == 1 else tuple(names)
    return P(*kept)


def constrain(x: Shaped[Array, "*shape"], *axes: Axes) -> Shaped[Array, "*shape"]:
    """Shard the last dimensions of x over these mesh axes, except absent axes and axes that do not divide."""
    sizes = axis_sizes()
    return jax.lax.with_sharding_constraint(x, fitting(x.shape, axes, sizes)) if sizes else x


def constrain_batch(x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Shard the first dimension of x over the batch axes and replicate the others."""
    return constrain(x, BATCH_AXES, *[None] * (x.ndim - 1))
