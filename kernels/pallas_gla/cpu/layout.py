"""How a scan is split into chunks of blocks on a CPU, and loads and stores of one chunk."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pallas_gla.cpu.block import BLOCK, LARGEST_SUM, Chunk
from pallas_gla.gating import log_decay
from pallas_gla.scan import STATE_INTERVAL, Operands, Scan
from pallas_gla.scan_order import segment_starts, to_raster_order, to_scan_order

# With numbers up to 1e7, the largest product, k v D with D the gradient of a state, stays below 1e37 over a
# million tokens.
LARGEST_SQUARE = 1e14
TOKENS = ("q", "k", "v", "g", "out_gate")


class Layout:
    """The chunks of a scan: up to 64 tokens, as many as between two saved states."""

    def __init__(self, operands: Operands, scan: Scan) -> None:
        self.scan = scan
        self.batch, self.tokens, self.heads, _ = operands.q.shape
        most = min(scan.chunk_size or STATE_INTERVAL, STATE_INTERVAL)
        self.size = min(most, max(BLOCK, 1 << (self.tokens - 1).bit_length()))
        self.chunks = -(-self.tokens // self.size)
        self.blocks = self.size // BLOCK

    def loop(self, regular: Bool[Array, " n"], fast: Callable, exact: Callable, carry: tuple) -> tuple:
        """Call fast(i, carry) for regular chunks and exact(i, carry) for others, in order.

        Args:
            regular: whether the tokens of a chunk are regular, in the order of the calls.
            fast: keeps a small state small.
            exact: runs every chunk.
            carry: starts with the state, which has to be small, too.
        """
        if self.chunks == 1:
            is_regular = regular[0] if carry[0] is None else regular[0] & small(carry[0])
            return jax.lax.cond(
                is_regular, *(functools.partial(f, np.int32(0)) for f in (fast, exact)), carry
            )

        def run(position, expected):
            """Run chunks until one is not as expected."""

            def is_next(position):
                i, is_small, _ = position
                return (i < self.chunks) & ((regular[i] & is_small) == expected)

            def step(position):
                i, is_small, carry = position
                carry = fast(i, carry) if expected else exact(i, carry)
                return i + 1, is_small if expected else small(carry[0]), carry

            return jax.lax.while_loop(is_next, step, position)

        # Two loops take turns, because a branch in one loop is slower: XLA copies its results, and does not
        # move constants out of it.
        position = np.int32(0), small(carry[0]), carry
        return jax.lax.while_loop(
            lambda position: position[0] < self.chunks,
            lambda position: run(run(position, True), False),
            position,
        )[2]

    def prepare(self, operands: Operands) -> Operands:
        """Return the operands in scan order, padded to whole chunks, with the starts of segments."""
        # Padding tokens have a decay of 1, which keeps the state: sigmoid(1e4) is exactly 1.
        fill = {"g": 1e4} if self.scan.gating else {}
        arrays = operands._asdict()
        for name in TOKENS:
            if arrays[name] is not None:
                arrays[name] = self.prepare_tokens(arrays[name], fill.get(name, 0))
        if operands.segment_ids is not None:
            ids = to_scan_order(operands.segment_ids, self.scan.grid, self.scan.direction)
            arrays["segment_ids"] = self._pad(segment_starts(ids)[..., None, None])
        return Operands(**arrays)

    def regular(
        self, arrays: Operands, d_out: Shaped[Array, "b padded h v"] | None = None
    ) -> Bool[Array, " n"]:
        """Return the chunks that `Block` may compute: bounded decays, and numbers that cannot overflow.

        The states have to be small, too.

        Args:
            arrays: the results of `prepare`.
            d_out: the gradient of the output, for a backward pass.
        """
        g = as_floats(arrays.g).astype(jnp.float32)
        if self.scan.gating:
            # softplus(-x) is at most max(-x, 0) + log 2.
            g = (jnp.maximum(-g, 0) + np.log(2.0).astype(np.float32)) / self.scan.gating.normalizer
        halves = jnp.abs(g).reshape(self.batch, -1, BLOCK // 2, g.shape[2] * g.shape[3]).sum(2)
        regular = halves.reshape(self.batch, self.chunks, -1).max((0, 2)) < LARGEST_SUM
        for x in (arrays.q, arrays.k, arrays.v, arrays.out_gate, d_out):
            if x is not None:
                regular &= small(as_floats(x).reshape(self.batch, self.chunks, -1), axis=(0, 2))
        return regular if arrays.norm_weight is None else regular & small(arrays.norm_weight)

    def prepare_tokens(
        self, x: Float[Array, "b t h w"], padding: float | int = 0
    ) -> Shaped[Array, "b padded h w"]:
        """Return the bits of an array in scan order, padded to whole chunks."""
        return as_bits(self._pad(to_scan_order(x, self.scan.grid, self.scan.direction), padding))

    def _pad(self, x: Shaped[Array, "b t *rest"], value: float | int = 0) -> Shaped[Array, "b padded *rest"]:
        missing = self.chunks * self.size - self.tokens
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value) if missing else x

    def first_state(self, operands: Operands) -> Float[Array, "b h k v"] | None:
        """Return the initial state, or None for a zero state of a single block (see `Block.states`)."""
        if operands.initial_state is not None:
            return operands.initial_state.astype(jnp.float32)
        return None if self.blocks * self.chunks == 1 else self.zeros(operands)

    def zeros(self, operands: Operands) -> Float[Array, "b h k v"]:
        """Return a state of zeros."""
        return jnp.zeros((self.batch, self.heads, operands.k.shape[3], operands.v.shape[3]), jnp.float32)

    def chunk(self, arrays: Operands, i, state: Float[Array, "b h k v"] | None) -> Operands:
        """Return chunk i of the tokens, in float32, with its incoming state."""
        found: dict[str, Any] = arrays._asdict() | {"initial_state": state}
        for name in TOKENS:
            if found[name] is not None:
                found[name] = self.take(found[name], i)
        if arrays.norm_weight is not None:
            found["norm_weight"] = arrays.norm_weight.astype(jnp.float32)
        if arrays.segment_ids is not None:
            found["segment_ids"] = self.take(arrays.segment_ids, i, bool)
        return Operands(**found)

    def in_blocks(self, chunk: Operands) -> Chunk:
        """Return the tokens of a chunk in blocks."""
        q, k, v, g = map(self.split, chunk[:4])
        if self.scan.gating:
            g = log_decay(g, self.scan.gating)
        starts = None if chunk.segment_ids is None else self.split(chunk.segment_ids)
        return Chunk(q * self.scan.scale, k, v, g, starts, (self.blocks, self.batch, self.heads))

    def gate(self, chunk: Operands) -> tuple[Float[Array, "m c v"], Float[Array, "m 1 v"]]:
        """Return the output gate of a chunk in blocks, and norm_weight."""
        assert chunk.norm_weight is not None and chunk.out_gate is not None
        weight = chunk.norm_weight[None, :, None, None]
        shape = (self.blocks, self.batch, self.heads, *weight.shape[3:])
        return self.split(chunk.out_gate), jnp.broadcast_to(weight, shape).reshape(-1, *weight.shape[3:])

    def batch_sums(self, x: Float[Array, "m 1 v"]) -> Float[Array, "b v"]:
        """Return the sums over blocks and heads."""
        return x.reshape(self.blocks, self.batch, self.heads, -1).sum((0, 2))

    def take(
        self, x: Shaped[Array, "b padded heads w"], i, dtype=jnp.float32
    ) -> Shaped[Array, "b c heads w"]:
        """Return chunk i of an array."""
        return as_floats(jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)).astype(dtype)

    def split(self, x: Shaped[Array, "b t heads w"]) -> Shaped[Array, "m c w"]:
        """Split a chunk into blocks of all batch elements and heads."""
        x = x.reshape(x.shape[0], self.blocks, BLOCK, *x.shape[2:]).transpose(1, 0, 3, 2, 4)
        return jnp.broadcast_to(x, (*x.shape[:2], self.heads, *x.shape[3:])).reshape(-1, *x.shape[3:])

    def join(self, x: Float[Array, "m c w"]) -> Float[Array, "b t heads w"]:
        """Invert `split`."""
        x = x.reshape(self.blocks, self.batch, self.heads, *x.shape[1:]).transpose(1, 0, 3, 2, 4)
        return x.reshape(self.batch, self.size, self.heads, x.shape[4])

    def buffer(self, like: Float[Array, "b t h w"]) -> Shaped[Array, "b padded h w"]:
        """Return an array that `put` fills."""
        shape = (like.shape[0], self.chunks * self.size, *like.shape[2:])
        return as_bits(jnp.zeros(shape, like.dtype))

    def put(
        self, buffer: Shaped[Array, "b padded h w"], i, x: Float[Array, "b c h w"]
    ) -> Shaped[Array, "b padded h w"]:
        """Write chunk i of a buffer."""
        x = as_bits(x.astype(as_floats(buffer[:0]).dtype))
        return jax.lax.dynamic_update_slice_in_dim(buffer, x, i * self.size, axis=1)

    def finish(self, buffer: Shaped[Array, "b padded h w"]) -> Float[Array, "b t h w"]:
        """Return a filled buffer in raster order."""
        x = as_floats(buffer)[:, : self.tokens]
        return to_raster_order(x, self.scan.grid, self.scan.direction)

    def put_state(self, states, i, state: Float[Array, "b h k v"]):
        """Save the incoming state of chunk i in the layout of `saved_shape`."""
        state = state.transpose(0, 3, 1, 2).reshape(self.batch, 1, state.shape[3], -1)
        dtype = jnp.float32 if states.dtype == jnp.float32 else jnp.bfloat16
        return jax.lax.dynamic_update_slice_in_dim(states, as_bits(state.astype(dtype)), i, axis=1)

    def get_state(self, states: Shaped[Array, "b n v hk"], i) -> Float[Array, "b h k v"]:
        """Return the incoming state of chunk i."""
        state = jax.lax.dynamic_index_in_dim(states, i, axis=1, keepdims=False)
        state = as_floats(state).astype(jnp.float32)
        return state.reshape(*state.shape[:2], self.heads, -1).transpose(0, 2, 3, 1)


def small(x: Float[Array, "*shape"], axis: tuple[int, ...] | None = None) -> Bool[Array, "*rest"]:
    """Return whether the squares of numbers have a small sum, which NaN and infinity have not."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis) < LARGEST_SQUARE


def as_bits(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return the bits of bfloat16 numbers.

    XLA for CPUs reads or updates a part of a bfloat16 array by converting the complete array to float32.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def as_floats(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return the numbers of `as_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
