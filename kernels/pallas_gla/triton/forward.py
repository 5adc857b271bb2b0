"""The forward kernels for GPUs.

A program follows one head through its chunks and keeps the transposed state [V, K] in registers. Inside a
chunk with cumulative log decays G, token i sees token j through exp(G_i - G_j), which is factorized relative
to the chunk's middle m (Yang et al. 2024, section 4.3):

    q~ = scale q exp(G - m)           k~ = k exp(m - G)         S~ = S exp(m)
    o  = tril(q~ k~^T) v + q~ S~      S' = (S~ + k~^T v) exp(G_last - m)

If a chunk's decay is too strong for this form, which is checked per chunk, the chunk runs token by token.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_gla.triton.chunk import (
    ChunkSegments,
    Decay,
    causal,
    next_state,
    only,
    run_part,
    token_count,
)
from pallas_gla.triton.tiling import TritonProgram, TritonTiling


def forward_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the kernel for the named arrays. In a split scan it continues from `parts_kernel`."""

    def gla_forward(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        state = program.loop(lambda chunk, state: _chunk(program, chunk, state), _first_state(program))
        program.store_end_state("final_state", state, tiling.parts - 1)

    return gla_forward


def parts_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first pass over a split scan: each part's state from zero, and its total decay."""

    def gla_forward_parts(*refs: Any) -> None:
        run_part(TritonProgram.current(tiling, dict(zip(names, refs, strict=True))), _chunk)

    return gla_forward_parts


def _first_state(program: TritonProgram) -> Float[Array, "v k"]:
    """Return the state that enters a program's part."""
    state = program.zero_state()
    if "initial_state" in program.refs:
        state = program.load_state("initial_state", program.end_state())
    if program.tiling.parts == 1:
        return state
    return lax.fori_loop(jnp.int32(0), program.part, program.through_part, state)


def _chunk(program: TritonProgram, chunk: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
    """Run a chunk, store o if the launch has it, and return the next state."""
    tiling = program.tiling
    positions = program.positions(chunk)
    decay = Decay.of(program, positions)
    with_output = "o" in program.refs
    q: Any = program.load("q", positions) if with_output else None
    k, v = program.load("k", positions), program.load("v", positions)
    if "states" in program.refs:
        program.store_state("states", program.chunk_state(chunk), state)

    def fast(state: Float[Array, "v k"]) -> Float[Array, "v k"]:
        segments = ChunkSegments.of(program, chunk)
        k_tilde = k.astype(jnp.float32) * tiling.exp2(-decay.relative)
        state = state * tiling.exp2(decay.before)
        if with_output:
            q_tilde = q.astype(jnp.float32) * (tiling.exp2(decay.relative) * tiling.scan.scale)
            scores = causal(tiling.dot(q_tilde, k_tilde, (1, 1)), segments)
            o = tiling.dot(scores, v) + tiling.dot(only(q_tilde, segments and segments.first), state, (1, 1))
            if tiling.scan.gating is None:
                program.store("o", positions, o)
        if segments is not None:
            state = jnp.where(segments.passes, state, 0.0)
        state += tiling.dot(v, only(k_tilde, segments and segments.last), (0, 0))
        state *= tiling.exp2(decay.after)
        if with_output and tiling.scan.gating is not None:
            # After the state update, whose operands would occupy registers that the gate needs.
            gate = program.load("out_gate", positions).astype(jnp.float32)
            program.store("o", positions, gated(program, o, gate))
        return state

    def safe(state: Float[Array, "v k"]) -> Float[Array, "v k"]:
        def token(i: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
            position = chunk * tiling.chunk + i
            state = next_state(program, position, state)
            if with_output:
                q = program.load_token("q", position) * tiling.scan.scale
                o = jnp.sum(state * q[None, :], axis=1)
                if tiling.scan.gating is not None:
                    gate = program.load_token("out_gate", position)
                    o = gated(program, o[None, :], gate[None, :])[0]
                program.store_token("o", position, o)
            return state

        return lax.fori_loop(jnp.int32(0), token_count(program, chunk), token, state)

    return lax.cond(decay.bounded, fast, safe, state)


def gated(program: TritonProgram, o: Float[Array, "c v"], gate: Float[Array, "c v"]) -> Float[Array, "c v"]:
    """Return RMSNorm(o) * norm_weight * SiLU(gate)."""
    tiling, gating = program.tiling, program.tiling.scan.gating
    assert gating is not None
    weight = program.load_line("norm_weight", program.element)
    square = jnp.sum(o * o, axis=1, keepdims=True) * (1 / tiling.values)
    return o * lax.rsqrt(square + gating.eps) * weight[None, :] * (gate * tiling.sigmoid(gate))
