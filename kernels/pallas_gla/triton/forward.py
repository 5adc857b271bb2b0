"""The forward kernels for GPUs.

A program follows one head through its chunks and keeps the transposed state [V, K] in registers. Inside a
chunk with cumulative log decays G, token i sees token j through exp(G_i - G_j), which is factorized (Yang et
al. 2024, section 4.3), here relative to half the chunk's decay, m = G_last / 2:

    q~ = scale q exp(G - m)           k~ = k exp(m - G)         S~ = S exp(m)
    o  = tril(q~ k~^T) v + q~ S~      S' = (S~ + k~^T v) exp(m)

So the state needs no other sum than m. If a chunk's decay is too strong for this form, the scan runs
again, in short chunks and token by token.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_gla.triton.chunk import (
    ChunkSegments,
    Decay,
    Fitness,
    causal,
    checked_chunk,
    next_state,
    only,
    token_count,
)
from pallas_gla.triton.tiling import SHORTEST_CHUNK, TritonProgram, TritonTiling, divide

State = Float[Array, "v k"]


def forward_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the kernel for the named arrays. In a split scan it continues from `parts_kernel`."""

    def gla_forward(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        state, _ = _run(program, lambda: _first_state(program))
        program.store_end_state("final_state", state, tiling.parts - 1)

    return gla_forward


def parts_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first pass over a split scan: each part's state from zero, and its total decay."""

    def gla_forward_parts(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        state, log2_decay = _run(program, program.zero_state)
        assert log2_decay is not None
        program.store_part(state, log2_decay)

    return gla_forward_parts


def _first_state(program: TritonProgram) -> Float[Array, "v k"]:
    """Return the state that enters a program's part."""
    state = program.zero_state()
    if "initial_state" in program.refs:
        state = program.load_state("initial_state", program.end_state())
    if program.tiling.parts == 1:
        return state
    return lax.fori_loop(jnp.int32(0), program.part, program.through_part, state)


def _run(
    program: TritonProgram, first_state: Callable[[], State]
) -> tuple[State, Float[Array, "_ k"] | None]:
    """Run all chunks, and store o if the launch has it.

    If a chunk turns out to be unfit for products, all chunks run again in `_run_slowly`: its decay is too
    strong, or a NaN or infinity in v has reached all tokens of o, and the state. A branch in the loop would
    add barriers, and Triton copies tiles in advance only if their loads are not in a branch.

    Returns:
        The last state and, in the first pass over a split scan, the total decay in equal rows.
    """
    tiling = program.tiling

    def step(chunk: Int[Array, ""], carry: tuple) -> tuple:
        state, total, fitness = carry
        _save(program, chunk, state)
        decay = Decay.of(program, program.positions(chunk))
        state = _by_products(program, chunk, decay, state)
        return state, None if total is None else total + decay.total, fitness.after(decay, state)

    total = None if "o" in program.refs else Decay.zero_total(tiling)
    # A later segment may hide that a state was not finite.
    fitness = Fitness.of(tiling, tiling.value_width if tiling.segmented else None)
    state, total, fitness = program.loop(step, (first_state(), total, fitness))
    state = lax.cond(
        fitness.of_all(state), lambda state: state, lambda _: _run_slowly(program, first_state()), state
    )
    return state, total


def _run_slowly(program: TritonProgram, state: State) -> State:
    """Run all chunks for any decay and any values, and return the last state.

    Short chunks fit stronger decays. The remaining ones run token by token, and so do all in gated scans and
    in float32, where short chunks would take more registers than the first run.
    """
    only_tokens = program.tiling.scan.gating is not None or program.tiling.dtype == jnp.float32
    short = program if only_tokens else program.of_chunks(SHORTEST_CHUNK)
    per_chunk = program.tiling.chunk // short.tiling.chunk

    def step(i: Int[Array, ""], state: State) -> State:
        chunk, rest = divide(i, per_chunk)
        lax.cond(rest == 0, lambda: _save(program, chunk, state), lambda: None)
        if only_tokens:
            return _by_token(program, i, state)
        return checked_chunk(short, i, state, _by_products, _by_token, lambda state: state)

    return short.loop(step, state)


def _save(program: TritonProgram, chunk: Int[Array, ""], state: State) -> None:
    """Store the state that enters a chunk, if the launch saves it."""
    if "states" in program.refs:
        program.store_state("states", program.chunk_state(chunk), state)


def _by_products(program: TritonProgram, chunk: Int[Array, ""], decay: Decay, state: State) -> State:
    """Run a chunk by matrix products, store o if the launch has it, and return the next state."""
    tiling, positions = program.tiling, program.positions(chunk)
    segments = ChunkSegments.of(program, chunk)
    first, last = (None, None) if segments is None else (segments.first, segments.last)
    k, v = program.load("k", positions), program.load("v", positions)
    k_tilde = tiling.operand(k.astype(jnp.float32) * tiling.exp2(-decay.relative))
    state = state * tiling.exp2(decay.before)
    o = None
    if "o" in program.refs:
        q = program.load("q", positions).astype(jnp.float32)
        q_tilde = tiling.operand(q * (tiling.exp2(decay.relative) * tiling.scan.scale))
        k_tilde = tiling.fixed(k_tilde)
        o = only(tiling.dot(q_tilde, state, (1, 1)), first)
        scores = causal(tiling.dot(q_tilde, k_tilde, (1, 1)), segments)
        o += tiling.dot(scores, v)
    if segments is not None:
        state = jnp.where(segments.passes, state, 0.0)
    state += tiling.dot(v, only(k_tilde, last), (0, 0))
    state = state * tiling.exp2(decay.after)
    if o is not None:
        # After the state, so that the gate occupies no registers before.
        if tiling.scan.gating is not None:
            o = gated(program, o, program.load("out_gate", positions).astype(jnp.float32))
        program.store("o", positions, o)
    return state


def _by_token(program: TritonProgram, chunk: Int[Array, ""], state: State) -> State:
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
