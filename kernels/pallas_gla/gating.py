"""The gates of `gated_gla_2d` in plain JAX and float32. Kernels compute them while a tile is in registers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla.scan import Gating


def log_decay(logits: Float[Array, "..."], gating: Gating) -> Float[Array, "..."]:
    """Return the log decay, logsigmoid(logits) / normalizer (Yang et al. 2024, section 4.4)."""
    return jax.nn.log_sigmoid(logits.astype(jnp.float32)) / gating.normalizer


def gated_output(
    o: Float[Array, "*shape v"],
    out_gate: Float[Array, "*shape v"],
    norm_weight: Float[Array, "... v"],
    gating: Gating,
) -> Float[Array, "*shape v"]:
    """Return RMSNorm(o) * norm_weight * SiLU(out_gate), normalized over the last axis."""
    o = o.astype(jnp.float32)
    o = o * jax.lax.rsqrt(jnp.mean(jnp.square(o), axis=-1, keepdims=True) + gating.eps)
    return o * norm_weight.astype(jnp.float32) * jax.nn.silu(out_gate.astype(jnp.float32))
