"""How a scan is split into chunks of blocks on a CPU, and loads and stores of one chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pallas_gla.cpu.block import BLOCK, LARGEST_SUM, Chunk
from pallas_gla.gating import log_decay
from pallas_gla.scan import STATE_INTERVAL, Operands, Scan
from pallas_gla.scan_order import segment_starts, to_raster_order, to_scan_order

# Products of four numbers stay below 1e36.
LARGEST_SQUARE = 1e18
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

    def loop(self, body, carry):
        """Call body(i, carry) for every chunk."""
        if self.chunks == 1:
            return body(np.int32(0), carry)
        return jax.lax.fori_loop(np.int32(0), np.int32(self.chunks), body, carry)

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

    def regular(self, operands: Operands, *gradients: Float[Array, "..."]) -> Bool[Array, ""]:
        """Return whether `Block` may compute this scan: bounded decays, and numbers that cannot overflow.

        Args:
            operands: the operands of the scan.
            gradients: the gradients of its results, for a backward pass.
        """
        g = self._pad(to_scan_order(operands.g, self.scan.grid, self.scan.direction)).astype(jnp.float32)
        if self.scan.gating:
            # softplus(-x) is at most max(-x, 0) + log 2.
            g = (jnp.maximum(-g, 0) + np.log(2.0).astype(np.float32)) / self.scan.gating.normalizer
        halves = jnp.abs(g).reshape(self.batch, -1, BLOCK // 2, g.shape[2] * g.shape[3])
        numbers = [x for x in (*operands[:3], *operands[4:7], *gradients) if x is not None]
        small = [jnp.sum(jnp.square(x.astype(jnp.float32))) < LARGEST_SQUARE for x in numbers]
        return functools.reduce(jnp.logical_and, small, jnp.max(halves.sum(2)) < LARGEST_SUM)

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

    def chunk(self, arrays: Operands, i) -> Chunk:
        """Return chunk i of the tokens."""
        q, k, v, g = (self.get(x, i) for x in arrays[:4])
        if self.scan.gating:
            g = log_decay(g, self.scan.gating)
        starts = None if arrays.segment_ids is None else self.get(arrays.segment_ids, i, bool)
        return Chunk(q * self.scan.scale, k, v, g, starts, (self.blocks, self.batch, self.heads))

    def gate(self, arrays: Operands, i) -> tuple[Float[Array, "m c v"], Float[Array, "m 1 v"]]:
        """Return chunk i of the output gate, and norm_weight."""
        assert arrays.norm_weight is not None and arrays.out_gate is not None
        weight = arrays.norm_weight.astype(jnp.float32)[None, :, None, None]
        shape = (self.blocks, self.batch, self.heads, *weight.shape[3:])
        return self.get(arrays.out_gate, i), jnp.broadcast_to(weight, shape).reshape(-1, *weight.shape[3:])

    def batch_sums(self, x: Float[Array, "m 1 v"]) -> Float[Array, "b v"]:
        """Return the sums over blocks and heads."""
        return x.reshape(self.blocks, self.batch, self.heads, -1).sum((0, 2))

    def get(self, x: Shaped[Array, "b padded heads w"], i, dtype=jnp.float32) -> Shaped[Array, "m c w"]:
        """Return chunk i of an array, in blocks of all batch elements and heads."""
        x = as_floats(jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, axis=1)).astype(dtype)
        x = x.reshape(x.shape[0], self.blocks, BLOCK, *x.shape[2:]).transpose(1, 0, 3, 2, 4)
        return jnp.broadcast_to(x, (*x.shape[:2], self.heads, *x.shape[3:])).reshape(-1, *x.shape[3:])

    def buffer(self, like: Float[Array, "b t h w"]) -> Shaped[Array, "b padded h w"]:
        """Return an array that `put` fills."""
        shape = (like.shape[0], self.chunks * self.size, *like.shape[2:])
        return as_bits(jnp.zeros(shape, like.dtype))

    def put(self, buffer, i, x: Float[Array, "m c w"], dtype):
        """Write chunk i of a buffer."""
        x = x.reshape(self.blocks, self.batch, self.heads, *x.shape[1:]).transpose(1, 0, 3, 2, 4)
        x = x.reshape(self.batch, self.size, self.heads, x.shape[4])
        return jax.lax.dynamic_update_slice_in_dim(buffer, as_bits(x.astype(dtype)), i * self.size, axis=1)

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


def as_bits(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return the bits of bfloat16 numbers.

    XLA for CPUs reads or updates a part of a bfloat16 array by converting the complete array to float32.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def as_floats(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return the numbers of `as_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
