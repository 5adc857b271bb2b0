"""The selective scan in plain JAX: a loop over chunks, whose states the backward pass computes again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla.selective_scan.scan import ROWS, Operands, Options, chunk_size

# x, dt, b, c and z of one chunk, [tokens, B, channels or states]; z may be None.
Chunk = tuple[Any, ...]
# Gradients of the state before the tokens that were visited last, of a and of d.
Carry = tuple[Array, Array, Array]


def forward(
    operands: Operands, options: Options, *, checkpoint: bool = False
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b m n d"]]:
    """Return the output, the final state, and the state that enters each chunk in the scan's direction.

    Args:
        checkpoint: whether JAX differentiates this function, and shall compute a chunk's states again.
    """
    run = functools.partial(_run_chunk, operands.a, operands.d, reverse=options.reverse)
    run = jax.checkpoint(run) if checkpoint else run

    def step(state: Array, chunk: Chunk) -> tuple[Array, tuple[Array, Array]]:
        final_state, y = run(state, chunk)
        return final_state, (y, state)

    final_state, (y, states) = jax.lax.scan(
        step, operands.initial_state, _chunks(operands), reverse=options.reverse
    )
    return _joined(y, operands.x), final_state, states.swapaxes(0, 1)


def backward(
    operands: Operands,
    states: Float[Array, "b m n d"],
    d_y: Float[Array, "b t d"],
    d_final_state: Float[Array, "b n d"],
    options: Options,
) -> Operands:
    """Return the gradients of the operands, from the states that `forward` saved."""

    def visit_chunk(carry: Carry, inputs: tuple) -> tuple[Carry, Chunk]:
        chunk, state, d_y = inputs
        # In parts of a few tokens, whose states stay in a CPU's caches.
        chunk, d_y = jax.tree.map(lambda x: x.reshape(-1, ROWS, *x.shape[1:]), (chunk, d_y))

        def save(state: Array, part: Chunk) -> tuple[Array, Array]:
            return _states(operands.a, state, part, reverse=options.reverse)[0], state

        def visit_part(carry: Carry, inputs: tuple) -> tuple[Carry, Chunk]:
            return _part_gradients(operands.a, operands.d, carry, *inputs, reverse=options.reverse)

        _, states = jax.lax.scan(save, state, chunk, reverse=options.reverse)
        carry, d_chunk = jax.lax.scan(visit_part, carry, (chunk, states, d_y), reverse=not options.reverse)
        return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), d_chunk)

    carry = (d_final_state, jnp.zeros_like(operands.a), jnp.zeros_like(operands.d))
    inputs = (_chunks(operands), states.swapaxes(0, 1), _split(d_y))
    (d_state, d_a, d_d), d_chunks = jax.lax.scan(visit_chunk, carry, inputs, reverse=not options.reverse)
    gradients: Chunk = tuple(
        None if d is None else _joined(d, like) for d, like in zip(d_chunks, _tokens(operands), strict=True)
    )
    x, dt, b, c, z = gradients
    return Operands(x, dt, d_a, b, c, d_d, z, d_state)


def _part_gradients(
    a: Float[Array, "n d"],
    d: Float[Array, " d"],
    carry: Carry,
    part: Chunk,
    state: Float[Array, "b n d"],
    d_y: Float[Array, "c b d"],
    *,
    reverse: bool,
) -> tuple[Carry, Chunk]:
    """Add the gradients of a and d; return them, the gradient of the part's first state, and the part's.

    By hand, because JAX's transpose of the loop would save every factor of the recurrence: more than a CPU's
    caches hold.
    """
    x, dt, b, c, z = part
    _, before = _states(a, state, part, reverse=reverse)
    d_ungated = d_y if z is None else d_y * jax.nn.silu(z)

    def step(carry: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple, Chunk]:
        d_state, d_a = carry
        x, dt, b, c, d_y, before = inputs
        after = _next_state(a, before, x, dt, b)
        d_state = d_state + d_y[:, None] * c[..., None]
        d_input = jnp.sum(d_state * b[..., None], axis=1)  # of dt x
        d_before = jnp.exp(dt[:, None] * a[None]) * d_state
        d_decay = d_before * before  # of the logarithm dt a
        d_dt = jnp.sum(d_decay * a[None], axis=1) + x * d_input
        d_a = d_a + jnp.sum(d_decay * dt[:, None], axis=0)
        y = jnp.sum(c[..., None] * after, axis=1)
        return (d_before, d_a), (dt * d_input, d_dt, _dot(d_state, dt * x), _dot(after, d_y), y)

    (d_state, d_a), (d_x, d_dt, d_b, d_c, y) = jax.lax.scan(
        step, carry[:2], (x, dt, b, c, d_ungated, before), reverse=not reverse
    )
    d_z = None
    if z is not None:
        gate = jax.nn.sigmoid(z)
        d_z = d_y * (y + d * x) * gate * (1 + z * (1 - gate))
    d_d = carry[2] + jnp.sum(d_ungated * x, axis=(0, 1))
    return (d_state, d_a, d_d), (d_x + d * d_ungated, d_dt, d_b, d_c, d_z)


def _states(
    a: Float[Array, "n d"], state: Float[Array, "b n d"], part: Chunk, *, reverse: bool
) -> tuple[Float[Array, "b n d"], Float[Array, "c b n d"]]:
    """Return the state after a part, and the state before each token."""
    x, dt, b, *_ = part

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        return _next_state(a, state, *token), state

    return jax.lax.scan(step, state, (x, dt, b), reverse=reverse)


def _dot(states: Float[Array, "b n d"], x: Float[Array, "b d"]) -> Float[Array, "b n"]:
    """Sum over the channels. A product, because XLA's sum over the last axis uses no vectors on a CPU."""
    return jnp.einsum("bnd,bd->bn", states, x, precision=jax.lax.Precision.HIGHEST)


def _next_state(
    a: Float[Array, "n d"],
    state: Float[Array, "b n d"],
    x: Float[Array, "b d"],
    dt: Float[Array, "b d"],
    b: Float[Array, "b n"],
) -> Float[Array, "b n d"]:
    """Return the state after a token."""
    return jnp.exp(dt[:, None] * a[None]) * state + (dt * x)[:, None] * b[..., None]


def _run_chunk(
    a: Float[Array, "n d"],
    d: Float[Array, " d"],
    state: Float[Array, "b n d"],
    chunk: Chunk,
    *,
    reverse: bool,
) -> tuple[Float[Array, "b n d"], Float[Array, "c b d"]]:
    """Run the recurrence over one chunk; return the outgoing state and the output."""
    x, dt, b, c, z = chunk

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x, dt, b, c = token
        state = _next_state(a, state, x, dt, b)
        return state, jnp.sum(c[..., None] * state, axis=1)

    state, y = jax.lax.scan(step, state, (x, dt, b, c), reverse=reverse)
    y = y + d[None, None] * x
    return state, y if z is None else y * jax.nn.silu(z)


def _tokens(operands: Operands) -> Chunk:
    return operands.x, operands.dt, operands.b, operands.c, operands.z


def _chunks(operands: Operands) -> Chunk:
    return tuple(None if x is None else _split(x) for x in _tokens(operands))


def _split(x: Float[Array, "b t w"]) -> Float[Array, "m c b w"]:
    """Cut into chunks of tokens, in float32. Steps of zero in the padding keep the state."""
    size = chunk_size(x.shape[1])
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % size), (0, 0)))
    return x.reshape(x.shape[0], -1, size, x.shape[2]).transpose(1, 2, 0, 3)


def _joined(x: Float[Array, "m c b w"], like: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
    """Invert `_split`, into the shape and dtype of `like`."""
    x = x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])
    return x[:, : like.shape[1]].astype(like.dtype)
