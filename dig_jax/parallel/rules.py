"""Sharding rules for parameters, by their path in the model; optimizer moments and averages follow them.

`tensor` shards heads and the channels of the MLP (Megatron-LM, Shoeybi et al. 2019): the columns of
projections into them and the rows of projections out of them, so that each branch needs one all-reduce.
`fsdp` shards the other dimension (ZeRO-3, Rajbhandari et al. 2020); each layer gathers it before use.

A fused projection holds several matrices side by side, each of which `tensor` would shard by columns. No
sharding of the fused matrix expresses that, so it is stored sharded by rows and resharded by columns before
use. This moves weights rather than tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from dig_jax.parallel.constraints import Axes, axis_sizes, fitting

# This order makes a shard along tensor contiguous after the gather along fsdp.
_BOTH = ("tensor", "fsdp")
# (end of the path, mesh axes of the last dimensions in storage, and in use); the first match wins.
_RULES = (
    (r"mixer/(q|k|v|gate)_proj/kernel", ("fsdp", "tensor"), (None, "tensor")),
    (r"(decay_up|dt_proj|mlp/hidden|modulation/linear)/kernel", ("fsdp", "tensor"), (None, "tensor")),
    (r"(decay_up|dt_proj|mlp/hidden)/bias", ("tensor",), ("tensor",)),
    (r"(mixer/o_proj|mixer/out_proj|x_proj|mlp/down|mlp/out)/kernel", ("tensor", "fsdp"), ("tensor", None)),
    (r"(qkv_proj|in_proj|gate_up)/kernel", (_BOTH, None), ("tensor", None)),
    (r"conv/kernel", (), ()),
)


def _rule(name: str, shape: Sequence[int]) -> tuple[Sequence[Axes], Sequence[Axes]]:
    """Return the mesh axes of the last dimensions, in storage and in use."""
    for path, stored, used in _RULES:
        if re.search(f"(^|/){path}$", name):
            return stored, used
    if not name.endswith(("kernel", "embedding")):
        return (), ()
    return ((_BOTH, None) if shape[-2] >= shape[-1] else (None, _BOTH)), ()


def _stored(name: str, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    return fitting(shape, _rule(name, shape)[0], sizes)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Return the shardings of a train state, or of any tree whose paths end like the paths of parameters.

    `_RULES` shard some matrices; other matrices are sharded along their larger dimension. Vectors, and
    dimensions that an axis does not divide, are replicated.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _stored(_name(path), leaf.shape, mesh.shape)), state
    )


def gather_params(params: Any, dtype: DTypeLike | None = None, *, but: str | None = None) -> Any:
    """Gather parameters along `fsdp`, as a layer needs them.

    Args:
        params: a tree whose paths end like the paths in the model.
        dtype: kernels are cast to it before the gather, which halves the communication for bfloat16.
        but: parameters below this name are not gathered.
    """
    sizes = axis_sizes()
    if not sizes.keys() & set(_BOTH):
        return params

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        name = _name(path)
        if but in name.split("/"):
            return leaf
        stored, used = (fitting(leaf.shape, axes, sizes) for axes in _rule(name, leaf.shape))
        if dtype is not None and name.endswith("kernel"):
            leaf = leaf.astype(dtype)
        # The first constraint is for the backward pass: it scatters the gradient.
        if stored == used:
            return leaf
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(leaf, stored), used)

    return jax.tree.map_with_path(gather, params)


def save_all_but_gathered(primitive: Primitive, *_, **__) -> bool:
    """Policy for `jax.checkpoint` that saves everything except gathered parameters."""
    return primitive.name != "sharding_constraint"
