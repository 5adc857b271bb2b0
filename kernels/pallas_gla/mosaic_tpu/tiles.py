"""Arithmetic on one tile of the TPU kernels: a chunk of tokens of a group of heads.

A group has as many heads as fill 128 lanes with keys. Their queries, keys and decays are side by side in
[C, heads * K] tiles, their values in [C, heads * V], and their transposed states in [V, heads * K].
Elementwise operations then use all lanes, and a decay per channel is a row. `stack_heads` converts a tile to
an operand that keeps heads apart in a matrix product.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.mosaic_tpu.tokens import LANES

# Decays are summed in bits, which saves a multiplication per exponential.
BITS = 1.4426950408889634
# Largest decay, in bits from the middle of a chunk to either end, for the factorized form.
MAX_SPAN = 58.0
# Largest decay of a half chunk, in bits and in at least one channel of a head, for dg as a difference.
MAX_DECAY = 6.0


@dataclasses.dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads that are processed together, and their lanes."""

    heads: int
    keys: slice
    values: slice


@dataclasses.dataclass(frozen=True)
class TpuTiling:
    """The static shape of a grid step: `heads` of `key_width` and `value_width`, `chunks` of `chunk` tokens.

    `keys` and `values` are `key_width` and `value_width` without padding. `dtype` is the dtype of operands
    of matrix products, bfloat16 or float32.
    """

    heads: int
    keys: int
    key_width: int
    value_width: int
    values: int
    chunk: int
    chunks: int
    reverse: bool
    dtype: jnp.dtype

    @functools.cached_property
    def groups(self) -> list[HeadGroup]:
        """Groups of heads; the last one may have fewer heads."""
        together = max(LANES // self.key_width, 1)
        starts = range(0, self.heads, together)
        return [self._group(start, min(together, self.heads - start)) for start in starts]

    def _group(self, start: int, heads: int) -> HeadGroup:
        keys, values = (slice(start * w, (start + heads) * w) for w in (self.key_width, self.value_width))
        return HeadGroup(heads, keys, values)

    @property
    def visits(self) -> list[int]:
        """Chunks of a step in scan order."""
        return list(range(self.chunks))[:: -1 if self.reverse else 1]

    @property
    def scan_rows(self) -> tuple[int, int, int]:
        """Rows of a chunk's first token along the scan, of the last before the middle, and of the last."""
        last = self.chunk - 1
        return (last, last - self.chunk // 2 + 1, 0) if self.reverse else (0, self.chunk // 2 - 1, last)

    def positions(self, heads: int = 1) -> tuple[Int[Array, "c n"], Int[Array, "c n"]]:
        """Return the scan positions of every row's and every lane's token in `heads` tiles side by side."""
        shape = (self.chunk, heads * self.chunk)
        i, j = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        for _ in range(1, heads):
            j = jnp.where(j >= self.chunk, j - self.chunk, j)
        return (self.chunk - 1 - i, self.chunk - 1 - j) if self.reverse else (i, j)

    def dot(
        self, x: Float[Array, "..."], y: Float[Array, "..."], contract: str = "nn"
    ) -> Float[Array, "..."]:
        """Return the matrix product x y; "nt" transposes y, "tn" transposes x."""
        axes = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[contract]
        return _dot(x.astype(self.dtype), y.astype(self.dtype), axes)

    def sums(
        self, which: Bool[Array, "c c"], x: Float[Array, "c w"], unit: float = 1.0, parts: int = 2
    ) -> Float[Array, "c w"]:
        """Return, for every row of `which`, the sum of the tokens that it marks, times `unit`.

        Marks are exact in bfloat16, and so are the `parts` into which x is split. With bfloat16 operands two
        parts have 16 bits of x, and three all of them, as float32 operands do.
        """
        mark = unit if float(jnp.finfo(jnp.bfloat16).dtype.type(unit)) == unit else 1.0
        marks = (which.astype(jnp.float32) * mark).astype(self.dtype)
        if self.dtype == jnp.float32 or x.dtype == jnp.bfloat16:
            total = _dot(marks, x.astype(self.dtype), (1, 0))
        else:
            terms, rest = [], x
            for _ in range(parts - 1):
                terms.append(_truncate_to_bfloat16(rest))
                rest = rest - terms[-1]
            tall = jnp.concatenate([*terms, rest]).astype(jnp.bfloat16)
            total = _dot(jnp.concatenate([marks] * parts, axis=1), tall, (1, 0))
        return total if mark == unit else total * unit


def _dot(x: Float[Array, "..."], y: Float[Array, "..."], axes: tuple[int, int]) -> Float[Array, "..."]:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, contract, precision=precision, preferred_element_type=jnp.float32)


def _truncate_to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    # Truncate by bits, because the compiler may remove a cast to bfloat16 and back.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _head_of_lane(shape: tuple[int, ...], heads: int) -> Int[Array, "r w"]:
    width = shape[1] // heads
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) >> (width.bit_length() - 1)


def keep(where: Bool[Array, "r w"], x: Float[Array, "r w"]) -> Float[Array, "r w"]:
    """Return x where the mask is true and 0 elsewhere."""
    # A zero of x's dtype, because a plain 0 has 64 bits with jax_enable_x64.
    return jnp.where(where, x, jnp.zeros((), x.dtype))


def stack_heads(x: Float[Array, "r w"], heads: int) -> Float[Array, "rows w"]:
    """Stack a copy of x per head, with the other heads' lanes set to zero; float32 if there are several."""
    if heads == 1:
        return x
    head = _head_of_lane(x.shape, heads)
    # The compiler makes a mask of float32 part of the product. A mask of bfloat16 takes selects.
    x = x.astype(jnp.float32)
    return jnp.concatenate([keep(head == h, x) for h in range(heads)])


def fold_heads(x: Float[Array, "rows w"], heads: int) -> Float[Array, "r w"]:
    """Merge `heads` stacked tiles, taking each head's lanes from the head's tile."""
    rows = x.shape[0] // heads
    head = _head_of_lane((rows, x.shape[1]), heads)
    folded = x[:rows]
    for h in range(1, heads):
        folded = jnp.where(head == h, x[h * rows : (h + 1) * rows], folded)
    return folded


def side_by_side(parts: Sequence[Any]) -> Any:
    """Concatenate the lanes of tiles."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def used_channels(tiling: TpuTiling, shape: tuple[int, ...]) -> Bool[Array, "r w"]:
    """Mask the lanes of keys that are no padding."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane & (tiling.key_width - 1)) < tiling.keys


def weakest_channels(tiling: TpuTiling, group: HeadGroup, decays: Float[Array, "r w"]) -> Float[Array, ""]:
    """Return the largest, over rows and heads, of the smallest decay of a head's channels."""
    head = _head_of_lane(decays.shape, group.heads)
    used = used_channels(tiling, decays.shape)
    infinity = jnp.full((), jnp.inf, decays.dtype)  # a plain one has 64 bits with jax_enable_x64
    smallest = [
        jnp.min(jnp.where((head == h) & used, decays, infinity), axis=1, keepdims=True)
        for h in range(group.heads)
    ]
    return jnp.max(functools.reduce(jnp.maximum, smallest))


def sigmoid_bits(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return -log2(sigmoid(x)) = log2(1 + exp(-x)), at least -x in bits."""
    bits = x * -BITS
    return jnp.maximum(jnp.log(1.0 + jnp.exp2(jnp.minimum(bits, 126.0))) * BITS, bits)


def sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the logistic function, by the chip's hyperbolic tangent."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x * sigmoid(x)."""
    half = 0.5 * x
    return half * jnp.tanh(half) + half


def emit_in_stages(items: Iterable[Iterator[None]]) -> None:
    """Run generators one stage apart, the last started first.

    The compiler keeps much of the program's order, so this places the products of one tile next to the
    elementwise work of others.
    """
    waiting, active = iter(items), []
    done = object()
    while True:
        item = next(waiting, None)
        if item is not None:
            active.insert(0, item)
        active = [item for item in active if next(item, done) is not done]
        if item is None and not active:
            return


def loop(count: int, body: Callable[[Int[Array, ""], Any], Any], carry: Any) -> Any:
    """Return the carry after `carry = body(n, carry)` for n = 0, ..., count - 1."""
    # Python integers would make n an int64 with jax_enable_x64, which the chip does not have.
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)


def levels(chunk: int) -> int:
    """Return the number of doublings from 1 token to the chunk."""
    return (chunk - 1).bit_length()


def pair_masks(i: Int[Array, "c n"], j: Int[Array, "c n"], level: Int[Array, ""]) -> Bool[Array, "c n"]:
    """Mask the pairs (i, j) in neighboring blocks of 2**level tokens, i in the second and j in the first."""
    block = i >> level
    return (block == (j >> level) + 1) & ((block & 1) == 1)


def sum_masks(
    i: Int[Array, "c c"], j: Int[Array, "c c"], level: Int[Array, ""] | int
) -> tuple[Bool[Array, "c c"], Bool[Array, "c c"]]:
    """Mask the tokens j in i's block of 2**level tokens: from its start to i, and from i + 1 to its end."""
    same = (i >> level) == (j >> level)
    return same & (j <= i), same & (j > i)


def for_chunks(tiling: TpuTiling, body: Callable[[Int[Array, ""]], None], last_first: bool = False) -> None:
    """Loop `body(chunk)` over the chunks of a step, along the scan or, with `last_first`, against it."""

    def visit(n: Int[Array, ""], _: None) -> None:
        body(tiling.chunks - 1 - n if tiling.reverse != last_first else n)

    loop(tiling.chunks, visit, None)
