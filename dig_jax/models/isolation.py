"""Parameters of a model whose GLA mixers let every token see only itself.

A decay of exp(-10,000) erases the state before each token. So o_t = scale (q_t · k_t) v_t, and a block with
such parameters mixes tokens only in its convolution. It takes the place of the identity attention map of
perturbed-attention guidance (Ahn et al. 2024): GLA has no attention map.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

# Times the gate normalizer 1/16, it is the decay's logarithm that the kernels document as a reset.
_LOGIT = -16e4


def isolate_tokens(params: dict[str, Any], blocks: Collection[int] = ()) -> dict[str, Any]:
    """Return the parameters of a DiG model with isolated tokens in these blocks; empty: in all.

    Args:
        params: the parameters, with the layout of `models/block_stack.py`.
        blocks: indices of blocks.

    Raises:
        ValueError: the model has a block without GLA, or no block of an index.
    """
    stack = params["blocks"]
    groups, rest = stack.get("groups", {}), stack.get("rest", {})
    period = max(len(groups), 1)
    repeats = _decay_bias(groups[0]).shape[0] if groups else 0
    depth = period * repeats + len(rest)
    if wrong := [block for block in blocks if not 0 <= block < depth]:
        raise ValueError(f"block out of range: got {wrong[0]}; expected 0 … {depth - 1}")
    groups, rest = dict(groups), dict(rest)
    for block in blocks or range(depth):
        layer, position = divmod(block, period)
        if layer < repeats:
            groups[position] = _with_decay_bias(groups[position], layer)
        else:
            rest[block - period * repeats] = _with_decay_bias(rest[block - period * repeats], ...)
    changed = {name: value for name, value in (("groups", groups), ("rest", rest)) if name in stack}
    return params | {"blocks": stack | changed}


def _decay_bias(block: dict[str, Any]) -> Any:
    if "decay_up" not in block["mixer"]:
        raise ValueError(
            "unsupported guidance 'perturbed': the model has softmax attention; expected GLA in every block"
        )
    return block["mixer"]["decay_up"]["bias"]


def _with_decay_bias(block: dict[str, Any], index: Any) -> dict[str, Any]:
    bias = jnp.asarray(_decay_bias(block)).at[index].set(_LOGIT)
    mixer = block["mixer"]
    return block | {"mixer": mixer | {"decay_up": mixer["decay_up"] | {"bias": bias}}}
