"""The selective scan in plain JAX: a loop over chunks, whose states the backward pass computes again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla.selective_scan.scan import Operands, Options, chunk_size

# x, dt, b, c and z of one chunk, [tokens, B, channels or states]; z may be None.
Chunk = tuple[Any, ...]


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

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, Chunk]:
        d_state, d_a, d_d = carry
        chunk, state, d_y = inputs
        run = functools.partial(_run_chunk, reverse=options.reverse)
        here = jax.vjp(run, operands.a, operands.d, state, chunk)[1]((d_state, d_y))
        return (here[2], d_a + here[0], d_d + here[1]), here[3]

    carry = (d_final_state, jnp.zeros_like(operands.a), jnp.zeros_like(operands.d))
    inputs = (_chunks(operands), states.swapaxes(0, 1), _split(d_y))
    (d_state, d_a, d_d), d_chunks = jax.lax.scan(step, carry, inputs, reverse=not options.reverse)
    gradients: Chunk = tuple(
        None if d is None else _joined(d, like) for d, like in zip(d_chunks, _tokens(operands), strict=True)
    )
    x, dt, b, c, z = gradients
    return Operands(x, dt, d_a, b, c, d_d, z, d_state)


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
        state = jnp.exp(dt[:, None] * a[None]) * state + (dt * x)[:, None] * b[..., None]
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
