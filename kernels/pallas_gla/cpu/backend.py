"""GLA for CPUs: plain JAX in blocks of 16 tokens, with small matrix products and without copies of inputs.

`block.py` has the mathematics. It is accurate for the decays of most models. Chunks with stronger decays use
the products of `pallas_gla.chunked_xla`. Chunks with NaN or infinity run token by token, because 0 * NaN in a
product would reach tokens that do not see the NaN.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla import chunked_xla, reference
from pallas_gla.cpu.block import Block, Chunk, finite
from pallas_gla.cpu.layout import TOKENS, Layout, as_bits, as_floats
from pallas_gla.gating import gated_output, log_decay
from pallas_gla.scan import Operands, Scan, saved_shape

# Token by token, a forward pass is faster while the states stay in the cache of a core: 0.9 of the time of
# blocks at 100 KB, 1.3 at 1.5 MB.
CACHE = 2**18


def unsupported(operands: Operands, scan: Scan) -> str | None:
    """Return None: every scan is supported."""
    del operands, scan
    return None


@functools.partial(jax.jit, static_argnames=("scan", "save"))
def forward(
    operands: Operands, scan: Scan, *, save: bool
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """Run a scan (see `pallas_gla.dispatch`)."""
    layout = Layout(operands, scan)
    if save or layout.chunks == 1:
        return _in_blocks(operands, scan, layout, save=save)

    def by_token():
        return reference.forward(operands, scan)

    def in_blocks():
        return _in_blocks(operands, scan, layout, save=False)[:2]

    most = CACHE // (4 * layout.heads * operands.k.shape[3] * operands.v.shape[3])
    if isinstance(layout.batch, int) and isinstance(most, int):
        out, final_state = by_token() if layout.batch <= most else in_blocks()
    else:  # an exported program with a symbolic batch chooses when it is compiled for a number
        few = jnp.asarray(layout.batch) <= jnp.asarray(most)
        out, final_state = jax.lax.cond(few, by_token, in_blocks)
    return out, final_state, None


def _in_blocks(operands: Operands, scan: Scan, layout: Layout, *, save: bool):
    """Run a scan in blocks of tokens; results as in `forward`."""
    state = layout.first_state(operands)
    arrays = layout.prepare(operands)
    out = layout.buffer(operands.v)
    states = as_bits(jnp.zeros(*saved_shape(operands, scan))) if save else None

    def body(i, carry):
        state, out, states = carry
        if save and state is not None:
            states = layout.put_state(states, i, state)
        state, o = _chunk_forward(state, lambda: layout.chunk(arrays, i))
        if scan.gating:
            out_gate, weight = layout.gate(arrays, i)
            o = gated_output(o, out_gate, weight, scan.gating)
        return state, layout.put(out, i, o, operands.v.dtype), states

    final_state, out, states = layout.loop(body, (state, out, states))
    if save:
        states = as_floats(states)
    return layout.finish(out), final_state, states


@functools.partial(jax.jit, static_argnames="scan")
def backward(
    operands: Operands,
    states: Float[Array, "b n v hk"],
    d_out: Float[Array, "b t h v"],
    d_final_state: Float[Array, "b h k v"],
    scan: Scan,
) -> Operands:
    """Return the gradients of a scan (see `pallas_gla.dispatch`)."""
    layout = Layout(operands, scan)
    arrays = layout.prepare(operands)
    states, d_out = as_bits(states), layout.prepare_tokens(d_out)
    tokens = {name: x for name, x in operands._asdict().items() if name in TOKENS and x is not None}
    d_weight = None if operands.norm_weight is None else jnp.zeros_like(operands.norm_weight)

    def body(step, carry):
        d_state, gradients, d_weight = carry
        i = layout.chunks - 1 - step

        def through_gate(o):
            """Return the gradients of o, out_gate and norm_weight."""
            d_o = layout.get(d_out, i)
            if scan.gating is None:
                return d_o, None, None
            gate = functools.partial(gated_output, gating=scan.gating)
            return jax.vjp(gate, o, *layout.gate(arrays, i))[1](d_o)

        state = None if layout.first_state(operands) is None else layout.get_state(states, i)
        d_state, d_chunk, d_gate, d_w = _chunk_backward(
            state, lambda: layout.chunk(arrays, i), d_state, through_gate
        )
        d_q, d_k, d_v, d_g = d_chunk
        if scan.gating:
            decay = functools.partial(log_decay, gating=scan.gating)
            d_g = jax.vjp(decay, layout.get(arrays.g, i))[1](d_g)[0]
            d_weight = d_weight + d_w.sum(0)[:, 0, 0]
        here = {"q": d_q * scan.scale, "k": d_k, "v": d_v, "g": d_g, "out_gate": d_gate}
        gradients = {name: layout.put(x, i, here[name], tokens[name].dtype) for name, x in gradients.items()}
        return d_state, gradients, d_weight

    gradients = {name: layout.buffer(x) for name, x in tokens.items()}
    d_state, gradients, d_weight = layout.loop(body, (d_final_state, gradients, d_weight))
    gradients = {name: layout.finish(x) for name, x in gradients.items()}
    d_state = None if operands.initial_state is None else d_state
    return Operands(**gradients, norm_weight=d_weight, initial_state=d_state)


def tangent(operands: Operands, tangents: Operands, scan: Scan) -> None:
    """Return None: forward mode runs `pallas_gla.chunked_xla`."""
    del operands, tangents, scan


def _chunk_forward(
    state: Float[Array, "b h k v"] | None, load: Callable[[], Chunk]
) -> tuple[Float[Array, "b h k v"], Float[Array, "n b h c v"]]:
    """Return the outgoing state and the output of a chunk. A state of None is zero."""
    block = Block(load())
    new_state, before = block.states(state)
    o = block.output(before)
    # In a product a NaN or infinity reaches the last row, whatever it is multiplied by.
    regular = block.bounded & finite(o)

    def slowly():
        first = jnp.zeros_like(new_state) if state is None else state
        return _by_token(first, *load())

    return jax.lax.cond(regular, lambda: (new_state, o), slowly)


def _chunk_backward(
    state: Float[Array, "b h k v"] | None,
    load: Callable[[], Chunk],
    d_state: Float[Array, "b h k v"],
    through_gate: Callable,
) -> tuple:
    """Return the gradients of the incoming state, of q, k, v and g, and of the gate.

    `through_gate` returns the gradients of o and of the gate, given o.
    """
    block = Block(load())
    before = None if state is None else block.states(state)[1]
    d_o, *d_gate = through_gate(block.output(before))
    d_before, d_chunk = block.gradients(before, d_state, d_o)
    regular = block.bounded & finite(*d_chunk)

    def slowly():
        chunk, first = load(), jnp.zeros_like(d_state) if state is None else state
        arrays = jax.tree.leaves((chunk[:4], d_o, first, d_state))
        isfinite = functools.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in arrays])
        run = functools.partial(_differentiate, first, chunk, d_state, through_gate)
        doubling, token = (functools.partial(run, function) for function in (_by_doubling, _by_token))
        d_before, *gradients = jax.lax.cond(isfinite, doubling, token)
        return None if state is None else d_before, *gradients

    return jax.lax.cond(regular, lambda: (d_before, d_chunk, *d_gate), slowly)


# The slow paths. They take the arguments (state, q, k, v, g, starts).


def _differentiate(state, chunk, d_state, through_gate, function) -> tuple:
    """Return the results of `_chunk_backward`, computed for one batch element at a time to save memory."""
    batch = jnp.arange(state.shape[0], dtype=jnp.int32)

    def element(tree, axis, i):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis), tree)

    def join(tree, axis):
        return jax.tree.map(lambda x: jnp.moveaxis(jnp.squeeze(x, axis + 1), 0, axis), tree)

    def inputs(i):
        return element(state, 0, i), *element(chunk, 1, i)

    o = join(jax.lax.map(lambda i: function(*inputs(i))[1], batch), 1)
    d_o, *d_gate = through_gate(o)

    def gradients(i):
        *arrays, starts = inputs(i)
        vjp = jax.vjp(functools.partial(function, starts=starts), *arrays)[1]
        return vjp((element(d_state, 0, i), element(d_o, 1, i)))

    d_before, *d_chunk = jax.lax.map(gradients, batch)
    return join(d_before, 0), join(tuple(d_chunk), 1), *d_gate


def _by_token(state, q, k, v, g, starts):
    """Run a chunk token by token. States of only a few tokens are alive when this is differentiated."""

    def step(state, token):
        q, k, v, g, starts = token
        if starts is not None:
            state = jnp.where(starts[..., None], 0, state)
        state = jnp.exp(g)[..., None] * state + k[..., None] * v[..., None, :]
        return state, jnp.sum(q[..., None] * state, axis=-2)

    def block(state, tokens):
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), tokens)
        state, o = jax.lax.scan(step, state, tokens)
        return state, jnp.moveaxis(o, 0, 2)

    return jax.lax.scan(jax.checkpoint(block, prevent_cse=False), state, (q, k, v, g, starts))


def _by_doubling(state, q, k, v, g, starts):
    """Run a chunk with the products of `chunked_xla`, which are accurate for every finite decay."""
    blocks = len(q)

    def join(x):
        return x.transpose(1, 0, 3, 2, 4).reshape(x.shape[1], -1, x.shape[2], x.shape[4])

    if starts is not None:
        starts = starts.transpose(1, 0, 3, 2, 4).reshape(starts.shape[1], -1)
    tokens = chunked_xla.Tokens(join(q), join(k), join(v), join(g), None)
    state, o = chunked_xla._chunk(state, None, tokens, starts, scan=Scan(1.0, (1, 1), "row"))
    return state, o.reshape(o.shape[0], blocks, -1, *o.shape[2:]).transpose(1, 0, 3, 2, 4)
