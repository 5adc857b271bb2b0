"""GLA for CPUs: plain JAX in blocks of 16 tokens, with small matrix products and without copies of inputs.

`block.py` has the mathematics. It is accurate for the decays of most models. Scans with stronger decays, NaN,
infinity or huge numbers run `pallas_gla.chunked_xla` or, without a gradient, `pallas_gla.reference`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla import chunked_xla, reference
from pallas_gla.cpu.block import Block
from pallas_gla.cpu.layout import TOKENS, Layout, as_bits, as_floats
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
    return jax.lax.cond(
        layout.regular(operands),
        lambda: _forward(operands, layout, save),
        # Token by token takes half of the time of chunks for any decay, but saves no states.
        lambda: (
            chunked_xla.forward(operands, scan, save=True)
            if save
            else (*reference.forward(operands, scan), None)
        ),
    )


def _forward(
    operands: Operands, layout: Layout, save: bool
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """Run a scan of finite numbers and bounded decays."""
    scan, arrays = layout.scan, layout.prepare(operands)

    def body(i, carry):
        state, out, states = carry
        if save and state is not None:
            states = layout.put_state(states, i, state)
        block = Block(layout.chunk(arrays, i))
        state, before = block.states(state)
        o = block.output(before)
        if scan.gating:
            out_gate, weight = layout.gate(arrays, i)
            o = gated_output(o, out_gate, weight, scan.gating)
        return state, layout.put(out, i, o, operands.v.dtype), states

    states = as_bits(jnp.zeros(*saved_shape(operands, scan))) if save else None
    carry = layout.first_state(operands), layout.buffer(operands.v), states
    final_state, out, states = layout.loop(body, carry)
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
    arrays = operands, states, d_out, d_final_state
    return jax.lax.cond(
        layout.regular(operands, d_out, d_final_state),
        lambda: _backward(*arrays, layout),
        lambda: chunked_xla.backward(*arrays, scan),
    )


def _backward(
    operands: Operands,
    states: Float[Array, "b n v hk"],
    d_out: Float[Array, "b t h v"],
    d_final_state: Float[Array, "b h k v"],
    layout: Layout,
) -> Operands:
    """Return the gradients of a scan of finite numbers and bounded decays."""
    scan, arrays = layout.scan, layout.prepare(operands)
    saved, d_out_bits = as_bits(states), layout.prepare_tokens(d_out)
    tokens = {name: x for name, x in operands._asdict().items() if name in TOKENS and x is not None}
    d_weight = None if operands.norm_weight is None else jnp.zeros_like(operands.norm_weight)

    def body(step, carry):
        d_state, gradients, d_weight = carry
        i = layout.chunks - 1 - step
        block = Block(layout.chunk(arrays, i))
        state = None if layout.first_state(operands) is None else layout.get_state(saved, i)
        before = None if state is None else block.states(state)[1]
        d_o, d_gate = layout.get(d_out_bits, i), None
        if scan.gating:
            gate = functools.partial(gated_output, gating=scan.gating)
            d_o, d_gate, d_w = jax.vjp(gate, block.output(before), *layout.gate(arrays, i))[1](d_o)
            d_weight = d_weight + layout.batch_sums(d_w)
        d_state, (d_q, d_k, d_v, d_g) = block.gradients(before, d_state, d_o)
        if scan.gating:
            decay = functools.partial(log_decay, gating=scan.gating)
            d_g = jax.vjp(decay, layout.get(arrays.g, i))[1](d_g)[0]
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
