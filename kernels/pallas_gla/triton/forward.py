"""The forward kernels for GPUs.

A program follows one head through its chunks and keeps the transposed state [V, K] in registers. Inside a
chunk with cumulative log decays G, token i sees token j through exp(G_i - G_j), which is factorized relative
to the chunk's middle m (Yang et al. 2024, section 4.3):

    q~ = scale q exp(G - m)           k~ = k exp(m - G)         S~ = S exp(m)
    o  = tril(q~ k~^T) v + q~ S~      S' = (S~ + k~^T v) exp(G_last - m)

If a chunk's decay is too strong for this form, which is checked per chunk, the chunk runs again, token by
token.
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
    is_finite,
    next_state,
    only,
    part_decay,
    token_count,
)
from pallas_gla.triton.tiling import TritonProgram, TritonTiling

State = Float[Array, "v k"]


def forward_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the kernel for the named arrays. In a split scan it continues from `parts_kernel`."""

    def gla_forward(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        state = _run(program, lambda: _first_state(program))
        program.store_end_state("final_state", state, tiling.parts - 1)

    return gla_forward


def parts_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first pass over a split scan: each part's state from zero, and its total decay."""

    def gla_forward_parts(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        program.store_part(_run(program, program.zero_state), part_decay(program))

    return gla_forward_parts


def _first_state(program: TritonProgram) -> Float[Array, "v k"]:
    """Return the state that enters a program's part."""
    state = program.zero_state()
    if "initial_state" in program.refs:
        state = program.load_state("initial_state", program.end_state())
    if program.tiling.parts == 1:
        return state
    return lax.fori_loop(jnp.int32(0), program.part, program.through_part, state)


def _run(program: TritonProgram, first_state: Callable[[], State]) -> State:
    """Run all chunks, store o if the launch has it, and return the last state.

    In the products of a chunk, a NaN or infinity in v reaches all tokens of o, and the state, where a NaN
    remains until a segment ends. Unless each chunk is checked, all chunks then run again, token by token.
    """
    state = program.loop(lambda chunk, state: _chunk(program, chunk, state), first_state())
    if _checks_each_chunk(program):
        return state

    def by_token(chunk: Int[Array, ""], state: State) -> State:
        if "states" in program.refs:
            program.store_state("states", program.chunk_state(chunk), state)
        return _safe(program, chunk, state)

    return lax.cond(
        is_finite(state), lambda state: state, lambda _: program.loop(by_token, first_state()), state
    )


def _checks_each_chunk(program: TritonProgram) -> bool:
    """Whether each chunk's state is checked for NaN.

    This costs gated scans 4 % more instructions, but a second loop costs them 76 registers. Segments end NaN.
    """
    return program.tiling.segmented or program.tiling.scan.gating is not None


def _chunk(program: TritonProgram, chunk: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
    """Run a chunk, store o if the launch has it, and return the next state.

    The fast form always runs, because Triton copies the tiles of the next chunk to shared memory in advance
    only if their loads are not in a branch.
    """
    positions = program.positions(chunk)
    decay = Decay.of(program, positions)
    if "states" in program.refs:
        program.store_state("states", program.chunk_state(chunk), state)
    after, o = _fast(program, chunk, decay, state)

    def keep(_: Array, after: Float[Array, "v k"], o: Float[Array, "c v"] | None) -> Float[Array, "v k"]:
        if o is not None:
            if program.tiling.scan.gating is not None:
                # In the branch, so that o and the gate occupy registers after the state update only.
                o = gated(program, o, program.load("out_gate", positions).astype(jnp.float32))
            program.store("o", positions, o)
        return after

    def replace(state: Float[Array, "v k"], *_: Array | None) -> Float[Array, "v k"]:
        return _safe(program, chunk, state)

    regular = decay.bounded
    if _checks_each_chunk(program):
        regular &= is_finite(after)
    return lax.cond(regular, keep, replace, state, after, o)


def _fast(
    program: TritonProgram, chunk: Int[Array, ""], decay: Decay, state: Float[Array, "v k"]
) -> tuple[Float[Array, "v k"], Float[Array, "c v"] | None]:
    """Return the next state and, if the launch has it, o; arbitrary if the decay is not bounded."""
    tiling, positions = program.tiling, program.positions(chunk)
    segments = ChunkSegments.of(program, chunk)
    o, first, last = (None, None, None) if segments is None else (None, segments.first, segments.last)
    k, v = program.load("k", positions), program.load("v", positions)
    k_tilde = k.astype(jnp.float32) * tiling.exp2(-decay.relative)
    state = state * tiling.exp2(decay.before)
    if "o" in program.refs:
        q = program.load("q", positions)
        q_tilde = q.astype(jnp.float32) * (tiling.exp2(decay.relative) * tiling.scan.scale)
        scores = causal(tiling.dot(q_tilde, k_tilde, (1, 1)), segments)
        o = tiling.dot(scores, v) + only(tiling.dot(q_tilde, state, (1, 1)), first)
    if segments is not None:
        state = jnp.where(segments.passes, state, 0.0)
    state += tiling.dot(v, only(k_tilde, last), (0, 0))
    return state * tiling.exp2(decay.after), o


def _safe(program: TritonProgram, chunk: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
    """Run a chunk token by token, store o if the launch has it, and return the next state."""
    tiling = program.tiling

    def token(i: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
        position = chunk * tiling.chunk + i
        state = next_state(program, position, state)
        if "o" in program.refs:
            q = program.load_token("q", position) * tiling.scan.scale
            o = jnp.sum(state * q[None, :], axis=1)
            if tiling.scan.gating is not None:
                gate = program.load_token("out_gate", position)
                o = gated(program, o[None, :], gate[None, :])[0]
            program.store_token("o", position, o)
        return state

    return lax.fori_loop(jnp.int32(0), token_count(program, chunk), token, state)


def gated(program: TritonProgram, o: Float[Array, "c v"], gate: Float[Array, "c v"]) -> Float[Array, "c v"]:
    """Return RMSNorm(o) * norm_weight * SiLU(gate)."""
    tiling, gating = program.tiling, program.tiling.scan.gating
    assert gating is not None
    weight = program.load_line("norm_weight", program.element)
    square = jnp.sum(o * o, axis=1, keepdims=True) * (1 / tiling.values)
    return o * lax.rsqrt(square + gating.eps) * weight[None, :] * (gate * tiling.sigmoid(gate))
