"""A model whose mixers let every token see only itself: its parameters and its modules.

A decay of exp(-10,000) erases the state before each token. So o_t = scale (q_t · k_t) v_t, and a block with
such parameters mixes tokens only in its convolution. It takes the place of the identity attention map of
perturbed-attention guidance (Ahn et al. 2024): GLA has no attention map. Softmax attention has one, but no
parameters that would make it the identity; `isolate_attention` sets it in all blocks at once.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import nnx

from dig_jax.models.mixers import LocalAttention, SoftmaxAttention

# Divided by the gate normalizer 16, it is the decay's logarithm that the kernels document as a reset. A state
# that halves every 10,000 tokens still falls to exp(-16) from one token to the next.
_LOGIT = -16e4


def isolate_attention(model: nnx.Module) -> None:
    """Isolate the tokens in every softmax or local attention of a model, in place."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, (SoftmaxAttention, LocalAttention)):
            module.isolated = True


def isolate_tokens(params: dict[str, Any], blocks: Collection[int] = ()) -> dict[str, Any]:
    """Return the parameters of a model with isolated tokens in these blocks with GLA; empty: in all of them.

    Args:
        params: the parameters, with the layout of `models/block_stack.py` in each level.
        blocks: indices of blocks.

    Raises:
        ValueError: a named block has no GLA or does not exist.
    """
    if "inward" in params.get("blocks", {}):
        raise ValueError(
            "unsupported guidance 'perturbed' of DiS; expected a model with GLA or softmax attention"
        )
    levels = [params] if "blocks" in params else list(params["levels"].values())
    depths = [_depth(level["blocks"]) for level in levels]
    if wrong := [block for block in blocks if not 0 <= block < sum(depths)]:
        raise ValueError(f"block out of range: got {wrong[0]}; expected 0 … {sum(depths) - 1}")
    isolated, start = [], 0
    for level, depth in zip(levels, depths, strict=True):
        own = [block - start for block in blocks or range(sum(depths)) if start <= block < start + depth]
        isolated.append(level | {"blocks": _isolated(level["blocks"], own, start, required=bool(blocks))})
        start += depth
    return isolated[0] if "blocks" in params else params | {"levels": dict(enumerate(isolated))}


def _period_and_repeats(stack: dict[str, Any]) -> tuple[int, int]:
    groups = stack.get("groups", {})
    return max(len(groups), 1), groups[0]["modulation"]["linear"]["bias"].shape[0] if groups else 0


def _depth(stack: dict[str, Any]) -> int:
    period, repeats = _period_and_repeats(stack)
    return period * repeats + len(stack.get("rest", {}))


def _isolated(
    stack: dict[str, Any], blocks: Collection[int], start: int, *, required: bool
) -> dict[str, Any]:
    """Isolate the tokens in these blocks of a stack whose first block is block `start` of the model."""
    groups, rest = dict(stack.get("groups", {})), dict(stack.get("rest", {}))
    period, repeats = _period_and_repeats(stack)
    for block in blocks:
        layer, position = divmod(block, period)
        stacked = layer < repeats
        part, key = (groups, position) if stacked else (rest, block - period * repeats)
        if "decay_up" in part[key]["mixer"]:
            part[key] = _with_decay_bias(part[key], layer if stacked else ...)
        elif required:
            raise ValueError(
                f"unsupported blocks of guidance 'perturbed': block {start + block} has no GLA;"
                " expected blocks with GLA, or none to perturb all blocks"
            )
    return stack | {name: value for name, value in (("groups", groups), ("rest", rest)) if name in stack}


def _with_decay_bias(block: dict[str, Any], index: Any) -> dict[str, Any]:
    mixer = block["mixer"]
    bias = jnp.asarray(mixer["decay_up"]["bias"]).at[index].set(_LOGIT)
    return block | {"mixer": mixer | {"decay_up": mixer["decay_up"] | {"bias": bias}}}
