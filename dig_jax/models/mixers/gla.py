"""Gated linear attention, the token mixer of DiG."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from pallas_gla import gated_gla_2d, gla, gla_2d

from dig_jax.errors import suggest
from dig_jax.models.layers import EPSILON, Linear
from dig_jax.models.mixers.heads import split_heads
from dig_jax.models.packing import Grid, PackedGrids
from dig_jax.parallel import local_grid, shard_map_rows

# GLA initializes its projections with gain 2^-2.5 (Yang et al. 2023): Xavier-uniform, variance times 2^-5.
_xavier_small = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")


HalfLife = float | tuple[float, ...] | str
"""Tokens after which a state is halved at initialization: of all heads, or of each head.

"grid" is the length of a line of the scan. "spread" is from half a line in the first head to the whole image
in the last one, evenly on a logarithmic scale.
"""


def parse_half_life(value: float | str | Sequence[float]) -> HalfLife:
    """Return a half-life from a number, one number per head, "grid", "spread" or the text of any of these.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str) and value in ("grid", "spread"):
        return value
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    try:
        numbers = tuple(map(float, parts))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        hint = suggest(value, ("grid", "spread")) if isinstance(value, str) else ""
        raise ValueError(
            f"invalid gate_normalizer={value!r}{hint}; expected a positive number of tokens, one per head,"
            " 'grid' or 'spread'"
        )
    return numbers[0] if len(numbers) == 1 else numbers


def half_lives(
    rule: HalfLife, grid: tuple[int, int], direction: str, num_heads: int
) -> float | tuple[float, ...]:
    """Return the half-life of all heads, or that of each head, on a grid of (rows, columns)."""
    line = grid[1] if "row" in direction else grid[0]
    if rule == "grid":
        return float(line)
    if rule == "spread":
        return tuple(np.geomspace(line / 2, grid[0] * grid[1], num_heads).tolist())
    assert not isinstance(rule, str)
    return rule


class GatedLinearAttention(nnx.Module):
    """GLA over a grid of tokens in one scan direction (Yang et al. 2023, section 4; DiG, section 3.3).

    q, k: width → key width; v and output gate: width → value width; decay logits: width → 16 → key width;
    log-decay = logsigmoid(logits)/gate_normalizer. Only the decay has a bias.

    Args:
        direction: "row", "row_reversed", "column" or "column_reversed", as in `gated_gla_2d`.
        gate_normalizer: with logits of 0, as at initialization, a state is halved every `gate_normalizer`
            tokens.
        key_expansion, value_expansion: key and value width, as multiples of the width.
        implementation: backend of `pallas_gla`; None selects the best available one.
    """

    decay_rank = 16

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        direction: str,
        gate_normalizer: HalfLife = 16.0,
        key_expansion: float = 0.5,
        value_expansion: float = 1.0,
        implementation: str | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        keys, values = key_expansion * width, value_expansion * width
        for name, size in (("key", keys), ("value", values)):
            if size % num_heads:
                raise ValueError(
                    f"invalid num_heads={num_heads}; expected a divisor of the {name} width {size:g}"
                    f" ({size / width:g} × {width})"
                )
        keys, values = int(keys), int(values)
        self.num_heads, self.direction, self.implementation = num_heads, direction, implementation
        self.gate_normalizer = gate_normalizer

        def linear(size_in: int, size_out: int, use_bias: bool = False) -> Linear:
            return Linear(
                size_in, size_out, use_bias=use_bias, kernel_init=_xavier_small, dtype=dtype, rngs=rngs
            )

        self.q_proj = linear(width, keys)
        self.k_proj = linear(width, keys)
        self.v_proj = linear(width, values)
        self.gate_proj = linear(width, values)
        self.decay_down = linear(width, self.decay_rank)
        self.decay_up = linear(self.decay_rank, keys, use_bias=True)
        self.norm_weight = nnx.Param(jnp.ones(values // num_heads))
        self.o_proj = linear(values, width)

    def __call__(self, x: Float[Array, "b t d"], grid: Grid) -> Float[Array, "b t d"]:
        """Mix the tokens of each image, in raster order on its grid."""

        def heads(y: Array) -> Array:
            return split_heads(_flat(y), self.num_heads)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        logits, out_gate = heads(self.decay_up(self.decay_down(x))), heads(self.gate_proj(x))
        if isinstance(grid, PackedGrids):
            o = self._gated(self._scan_packed(q, k, v, logits, grid), out_gate)
            return self.o_proj(_flat(o.reshape(*x.shape[:2], -1)))
        halved = half_lives(self.gate_normalizer, grid, self.direction, self.num_heads)
        options = {
            "grid": local_grid(grid),
            "direction": self.direction,
            "implementation": self.implementation,
        }
        if isinstance(halved, tuple):
            # The kernels compute gates with one normalizer only.
            decay = jax.nn.log_sigmoid(logits.astype(jnp.float32)) / jnp.float32(halved)[:, None]
            o = shard_map_rows(functools.partial(gla_2d, **options), q, k, v, decay)
            o = self._gated(o, out_gate)
        else:
            core = functools.partial(gated_gla_2d, gate_normalizer=halved, **options)
            o = shard_map_rows(core, q, k, v, logits, out_gate, self.norm_weight[...])
        return self.o_proj(_flat(o.reshape(*x.shape[:2], -1)))

    def _scan_packed(
        self,
        q: Float[Array, "b t h k"],
        k: Float[Array, "b t h k"],
        v: Float[Array, "b t h v"],
        logits: Float[Array, "b t h k"],
        grids: PackedGrids,
    ) -> Float[Array, "b t h v"]:
        """Scan images one after the other, each from an empty state and with the half-lives of its grid."""
        heads = self.num_heads
        halved = [
            np.broadcast_to(half_lives(self.gate_normalizer, grid, self.direction, heads), heads)
            for grid in grids.grids
        ]
        of_token = np.repeat(np.array(halved, np.float32), grids.sizes, axis=0)[..., None]
        decay = jax.nn.log_sigmoid(logits.astype(jnp.float32)) / of_token
        ids = grids.segment_ids  # the same in the order by columns

        def scan(*operands: Array, axis_name: str | None) -> Array:
            return gla(  # pyright: ignore[reportReturnType] (a tuple only with a final state)
                *operands,
                reverse="reversed" in self.direction,
                segment_ids=jnp.broadcast_to(ids, operands[0].shape[:2]),
                axis_name=axis_name,
                implementation=self.implementation,
            )

        if "row" in self.direction:
            return shard_map_rows(scan, q, k, v, decay)
        order = grids.by_columns
        return shard_map_rows(scan, *(x[:, order] for x in (q, k, v, decay)))[:, np.argsort(order)]

    def _gated(
        self, o: Float[Array, "b t h v"], out_gate: Float[Array, "b t h v"]
    ) -> Float[Array, "b t h v"]:
        """Return RMSNorm(o) · norm_weight · SiLU(out_gate), computed in float32, as `gated_gla_2d` does."""
        y = o.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + EPSILON)
        return (y * self.norm_weight[...] * jax.nn.silu(out_gate.astype(jnp.float32))).astype(o.dtype)


def _flat(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Keep the compiler from splitting the channels into heads before this point.

    Otherwise the TPU compiler splits them inside the projection, pads each head to 128 lanes and then copies
    the result for the kernel: a fifth of the memory traffic of a DiG-XL step.
    """
    return jax.lax.optimization_barrier(x)
