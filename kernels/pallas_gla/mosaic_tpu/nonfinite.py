"""NaN and infinities in the TPU kernels, kept from tokens that do not depend on them.

A product multiplies all tokens of a chunk and all heads of a group, and zero times NaN is NaN. A step whose
results are not finite therefore runs again by bisection, with zeros in place of such numbers. Flags, 1.0 or
0.0 per token and channel, follow them along the scan; the results that they reach become NaN.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.mosaic_tpu import tiles
from pallas_gla.mosaic_tpu.tiles import HeadGroup, TpuTiling
from pallas_gla.mosaic_tpu.tokens import Columns, Tokens

# A decay of this many bits is zero in float32, so that not even NaN pass it.
NO_STATE = -512.0


@dataclasses.dataclass(frozen=True)
class FiniteTokens:
    """Tokens whose NaN and infinities are read as zeros."""

    tokens: Any

    def load(self, chunk: int | Int[Array, ""], lanes: slice, dtype: Any = None) -> Float[Array, "c w"]:
        """Load the tokens of a chunk, by default in the dtype of the array."""
        return finite(self.tokens.load(chunk, lanes, dtype))

    def store(self, chunk: int | Int[Array, ""], lanes: slice, x: Float[Array, "c w"]) -> None:
        """Store the tokens of a chunk, as they are."""
        self.tokens.store(chunk, lanes, x)


def finite_inputs(refs: dict[str, Any]) -> dict[str, Any]:
    """Return `refs` with `FiniteTokens`, but for g, in which -inf is a valid number."""
    tokens = {name: x for name, x in refs.items() if isinstance(x, Tokens | Columns) and name != "g"}
    return refs | {name: FiniteTokens(x) for name, x in tokens.items()}


def finite(x: Float[Array, "r w"]) -> Float[Array, "r w"]:
    """Replace NaN and infinities by zeros."""
    return tiles.keep(_is_finite(x), x)


def flags(x: Float[Array, "r w"]) -> Float[Array, "r w"]:
    """Return 1 for NaN and infinities, else 0."""
    return jnp.logical_not(_is_finite(x)).astype(jnp.float32)


def mark(flags: Float[Array, "r w"], x: Float[Array, "s w"]) -> Float[Array, "s w"]:
    """Return x with NaN where there are flags."""
    return jnp.where(flags > 0, jnp.full((), jnp.nan, x.dtype), x)


def _is_finite(x: Float[Array, "r w"]) -> Bool[Array, "r w"]:
    return jnp.abs(x.astype(jnp.float32)) < jnp.full((), jnp.inf, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far NaN and infinities reach in one chunk of a group of heads.

    tiling, group: the chunk's tile.
    refs: the arrays of the grid step.
    chunk: the chunk.
    g: the decays in bits, at least `NO_STATE`.
    """

    tiling: TpuTiling
    group: HeadGroup
    refs: dict[str, Any]
    chunk: Int[Array, ""]
    g: Float[Array, "c w"]

    @functools.cached_property
    def writers(self) -> Float[Array, "c w"]:
        """Flag the keys of tokens that write such a number to the state."""
        keys = self._flags(("k", "k_dot", "g_dot"), self.group.keys) + flags(self.g)
        return self.on_keys(self.on_values(keys) + self._flags(("v", "v_dot"), self.group.values))

    def seen(self, *states: Float[Array, "v w"]) -> Float[Array, "c w"]:
        """Flag the tokens that see a writer, themselves or earlier, or such a number in the states."""
        entering = functools.reduce(jnp.maximum, map(_any_row, states)) * self._passes
        step = -1 if self.tiling.reverse else 1
        return self._spread(self.writers, entering, self._passes, self.tiling.scan_rows[0], step)

    def lost(self, seen: Float[Array, "c w"]) -> Float[Array, "c vw"]:
        """Flag the outputs that see such a number, by their own query or gate too."""
        keys = seen + self._flags(("q", "q_dot"), self.group.keys)
        return self.on_values(keys) + self._flags(("out_gate", "out_gate_dot"), self.group.values)

    def readers(self, lost: Float[Array, "c vw"]) -> Float[Array, "c w"]:
        """Flag the keys of tokens whose query, decay or gradient of the output is such a number."""
        return self.on_keys(lost) + self._flags(("q",), self.group.keys) + flags(self.g)

    def needed(self, readers: Float[Array, "c w"], d_state: Float[Array, "v w"]) -> Float[Array, "c w"]:
        """Flag the tokens that a reader sees, itself or later, or that `d_state` does."""
        step = 1 if self.tiling.reverse else -1
        entering = jnp.broadcast_to(_any_row(d_state), readers.shape)
        return self._spread(readers, entering, _shift(self._passes, step), self.tiling.scan_rows[2], step)

    def incoming(self, needed: Float[Array, "c w"]) -> Float[Array, "1 w"]:
        """Flag the channels of the incoming state that `needed` tokens read."""
        first = self.tiling.scan_rows[0]
        return (needed * self._passes)[first : first + 1]

    def on_values(self, flags: Float[Array, "r w"]) -> Float[Array, "r vw"]:
        """Flag all values of a head if any of its keys has a flag."""
        return self.tiling.dot(flags, self._ones, "nt")

    def on_keys(self, flags: Float[Array, "r vw"]) -> Float[Array, "r w"]:
        """Flag all keys of a head if any of its values has a flag."""
        return self.tiling.dot(flags, self._ones)

    @functools.cached_property
    def _ones(self) -> Float[Array, "vw w"]:
        shape = (self.tiling.value_width, self.g.shape[1])
        return tiles.stack_heads(jnp.ones(shape, jnp.float32), self.group.heads)

    @functools.cached_property
    def _passes(self) -> Float[Array, "c w"]:
        """0 where a decay ends the state of a channel, and in padding, which has no decay, else 1."""
        passes = tiles.used_channels(self.tiling, self.g.shape) & jnp.logical_not(self.g <= NO_STATE)
        return passes.astype(jnp.float32)

    def _flags(self, names: Iterable[str], lanes: slice) -> Any:
        """Flag the numbers of one or more arrays, of those that there are."""
        loaded = (self.refs[name].load(self.chunk, lanes) for name in names if name in self.refs)
        return sum((flags(x) for x in loaded), start=0.0)

    def _spread(
        self,
        flags: Float[Array, "c w"],
        entering: Float[Array, "c w"],
        passes: Float[Array, "c w"],
        start: int,
        step: int,
    ) -> Float[Array, "c w"]:
        """Spread flags from row `start` by `step`, in twice as large distances each time."""
        row = jax.lax.broadcasted_iota(jnp.int32, flags.shape, 0)
        flags = jnp.maximum(flags, tiles.keep(row == start, entering))
        for level in range(tiles.levels(self.tiling.chunk)):
            distance = step * 2**level
            flags = jnp.maximum(flags, passes * _shift(flags, distance))
            passes *= _shift(passes, distance)
        return flags


def _any_row(x: Float[Array, "v w"]) -> Float[Array, "1 w"]:
    return jnp.max(flags(x), axis=0, keepdims=True)


def _shift(x: Float[Array, "c w"], rows: int) -> Float[Array, "c w"]:
    """Move rows down, or up if `rows` is negative, and fill with zeros."""
    zeros = jnp.zeros((abs(rows), x.shape[1]), x.dtype)
    return jnp.concatenate([zeros, x[:-rows]] if rows > 0 else [x[-rows:], zeros])
