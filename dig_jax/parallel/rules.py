"""How parameters lie on the mesh: by the path that they have in the model, and so their moments and averages.

Heads and the channels of the MLP are split over `tensor` (Megatron-LM, Shoeybi et al. 2019): columns of the
projections into them, rows of those out of them, so that a branch adds up over the devices once. The other
dimension is split over `fsdp` (ZeRO-3, Rajbhandari et al. 2020), and gathered where a layer is computed.

The columns of a fused projection are several parts, each of which `tensor` splits, and no layout of the whole
says that. It is kept in parts of rows, and turned into parts of columns where it is used: that moves a weight
and not the tokens.
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

# In this order what is gathered along fsdp is one piece of what tensor splits.
_BOTH = ("tensor", "fsdp")
# (end of the path, mesh axes of the last dimensions as kept, and as used); the first match holds.
_RULES = (
    (r"mixer/(q|k|v|gate)_proj/kernel", ("fsdp", "tensor"), (None, "tensor")),
    (r"(decay_up|mlp/hidden|modulation/linear)/kernel", ("fsdp", "tensor"), (None, "tensor")),
    (r"(decay_up|mlp/hidden)/bias", ("tensor",), ("tensor",)),
    (r"(mixer/o_proj|mlp/down|mlp/out)/kernel", ("tensor", "fsdp"), ("tensor", None)),
    (r"(qkv_proj|gate_up)/kernel", (_BOTH, None), ("tensor", None)),
    (r"conv/kernel", (), ()),
)


def _rule(name: str, shape: Sequence[int]) -> tuple[Sequence[Axes], Sequence[Axes]]:
    """The mesh axes of the last dimensions, as kept and as used."""
    for path, kept, used in _RULES:
        if re.search(f"(^|/){path}$", name):
            return kept, used
    if not name.endswith(("kernel", "embedding")):
        return (), ()
    return ((_BOTH, None) if shape[-2] >= shape[-1] else (None, _BOTH)), ()


def _kept(name: str, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    return fitting(shape, _rule(name, shape)[0], sizes)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """How a state lies on the mesh, or any tree whose paths end as those of parameters do.

    Matrices are split by `_RULES`, others along their larger dimension; vectors are whole on every device,
    and so is what an axis does not divide.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _kept(_name(path), leaf.shape, mesh.shape)), state
    )


def gather_params(params: Any, dtype: DTypeLike | None = None) -> Any:
    """Parameters as a layer computes with them: whole along `fsdp`.

    Args:
        params: of blocks in their parts of the tree, or of what stands around them.
        dtype: kernels are cast to it before they are gathered, which halves what is sent.
    """
    sizes = axis_sizes()
    if not sizes.keys() & set(_BOTH):
        return params

    def gather(path: tuple, leaf: jax.Array) -> jax.Array:
        name = _name(path)
        kept, used = (fitting(leaf.shape, axes, sizes) for axes in _rule(name, leaf.shape))
        if dtype is not None and name.endswith("kernel"):
            leaf = leaf.astype(dtype)
        # The first constraint is for the way back: a gradient leaves in parts.
        if kept == used:
            return leaf
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(leaf, kept), used)

    return jax.tree.map_with_path(gather, params)


def save_all_but_gathered(primitive: Primitive, *_, **__) -> bool:
    """A policy of `jax.checkpoint`: gathered parameters are gathered again for the backward pass."""
    return primitive.name != "sharding_constraint"
