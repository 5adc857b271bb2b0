"""GLA for CPUs: plain JAX in blocks of 16 tokens, with small matrix products and without copies of inputs.

`block.py` has the mathematics. It is accurate for the decays of most models. Chunks with stronger decays,
NaN, infinity or huge numbers run token by token, and `pallas_gla.chunked_xla` computes their gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla import chunked_xla, reference
from pallas_gla.cpu.block import Block
from pallas_gla.cpu.layout import TOKENS, Layout, as_bits, as_floats, small
from pallas_gla.gating import gated_output, log_decay
from pallas_gla.scan import Operands, Scan, saved_shape


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
    arrays, first_state = layout.prepare(operands), layout.first_state(operands)

    def body(run, i, carry):
        state, out, states = carry
        if save and state is not None:
            states = layout.put_state(states, i, state)
        state, o = run(layout.chunk(arrays, i, state), layout)
        return state, layout.put(out, i, o), states

    states = as_bits(jnp.zeros(*saved_shape(operands, scan))) if save else None
    carry = first_state, layout.buffer(operands.v), states
    fast, exact = (functools.partial(body, run) for run in (_blocks, _by_token))
    final_state, out, states = layout.loop(layout.regular(arrays), fast, exact, carry)
    return layout.finish(out), final_state, as_floats(states) if save else None


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
    arrays, saved, d_out_bits = layout.prepare(operands), as_bits(states), layout.prepare_tokens(d_out)
    tokens = {name: x for name, x in operands._asdict().items() if name in TOKENS and x is not None}
    has_state = layout.first_state(operands) is not None
    regular = layout.regular(arrays, d_out_bits) & small(states, axis=(0, 2, 3))

    def body(run, step, carry):
        d_state, gradients, d_weight = carry
        i = layout.chunks - 1 - step
        chunk = layout.chunk(arrays, i, layout.get_state(saved, i) if has_state else None)
        here = run(chunk, layout.take(d_out_bits, i), d_state, layout)
        gradients = {name: layout.put(x, i, getattr(here, name)) for name, x in gradients.items()}
        d_weight = None if d_weight is None else d_weight + here.norm_weight
        return here.initial_state, gradients, d_weight

    gradients = {name: layout.buffer(x) for name, x in tokens.items()}
    d_weight = None if operands.norm_weight is None else jnp.zeros_like(operands.norm_weight)
    fast, exact = (functools.partial(body, run) for run in (_block_gradients, _exact_gradients))
    carry = d_final_state, gradients, d_weight
    d_state, gradients, d_weight = layout.loop(regular[::-1], fast, exact, carry)
    gradients = {name: layout.finish(x) for name, x in gradients.items()}
    d_state = None if operands.initial_state is None else d_state
    return Operands(**gradients, norm_weight=d_weight, initial_state=d_state)


def tangent(operands: Operands, tangents: Operands, scan: Scan) -> None:
    """Return None: forward mode runs `pallas_gla.chunked_xla`."""
    del operands, tangents, scan


# The functions of one chunk. Its tokens are in scan order, its segment ids are the starts of segments, and
# its initial state is the incoming state.


def _blocks(chunk: Operands, layout: Layout) -> tuple[Float[Array, "b h k v"], Float[Array, "b c h v"]]:
    """Return the outgoing state and the output of a chunk of finite numbers and bounded decays."""
    block = Block(layout.in_blocks(chunk))
    state, before = block.states(chunk.initial_state)
    o = block.output(before)
    if layout.scan.gating:
        o = gated_output(o, *layout.gate(chunk), layout.scan.gating)
    return state, layout.join(o)


def _by_token(chunk: Operands, layout: Layout) -> tuple[Float[Array, "b h k v"], Float[Array, "b c h v"]]:
    """Return the outgoing state and the output of any chunk."""
    if chunk.segment_ids is not None:
        # A segment may start at the first token, too.
        ids = jnp.cumsum(chunk.segment_ids[..., 0, 0], axis=1, dtype=jnp.int32)
        chunk = chunk._replace(segment_ids=ids)
        if chunk.initial_state is not None:
            chunk = chunk._replace(
                initial_state=jnp.where(ids[:, :1, None, None] == 0, chunk.initial_state, 0)
            )
    scan = dataclasses.replace(layout.scan, grid=(1, layout.size), direction="row")
    o, state = reference.forward(chunk, scan)
    return state, o


def _block_gradients(
    chunk: Operands, d_o: Float[Array, "b c h v"], d_state: Float[Array, "b h k v"], layout: Layout
) -> Operands:
    """Return the gradients of a chunk of finite numbers and bounded decays."""
    scan, block, d_o = layout.scan, Block(layout.in_blocks(chunk)), layout.split(d_o)
    before = None if chunk.initial_state is None else block.states(chunk.initial_state)[1]
    d_gate = d_weight = None
    if scan.gating:
        gate = functools.partial(gated_output, gating=scan.gating)
        d_o, d_gates, d_weights = jax.vjp(gate, block.output(before), *layout.gate(chunk))[1](d_o)
        d_gate, d_weight = layout.join(d_gates), layout.batch_sums(d_weights)
    d_before, gradients = block.gradients(before, d_state, d_o)
    d_q, d_k, d_v, d_g = map(layout.join, gradients)
    if scan.gating:
        decay = functools.partial(log_decay, gating=scan.gating)
        d_g = jax.vjp(decay, chunk.g)[1](d_g)[0]
    return Operands(d_q * scan.scale, d_k, d_v, d_g, d_gate, d_weight, d_before)


def _exact_gradients(
    chunk: Operands, d_o: Float[Array, "b c h v"], d_state: Float[Array, "b h k v"], layout: Layout
) -> Operands:
    """Return the gradients of any chunk."""
    starts = None if chunk.segment_ids is None else chunk.segment_ids[..., 0, 0]
    run = functools.partial(chunked_xla.run_chunk, starts=starts, scan=layout.scan)
    tokens = chunked_xla.Tokens(*chunk[:5])
    vjp = jax.vjp(run, chunk.initial_state, chunk.norm_weight, tokens)[1]
    d_initial, d_weight, gradients = vjp((d_state, d_o))
    return Operands(**gradients._asdict(), norm_weight=d_weight, initial_state=d_initial)
