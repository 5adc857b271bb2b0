"""The tangent kernel for GPUs: the forward pass and its derivative in one launch.

With the names of `pallas_gla.triton.forward`, a dot for tangents, and D the sum of g_dot until a token, minus
half its total 2 D_half in the chunk:

    a~ = scale (q_dot + q D) exp(G - m)         b~ = (k_dot - k D) exp(m - G)
    S~_dot = (S_dot + D_half S) exp(m)
    o_dot  = tril(a~ k~^T + q~ b~^T) v + tril(q~ k~^T) v_dot + a~ S~ + q~ S~_dot
    S'_dot = (S~_dot + b~^T v + k~^T v_dot + D_half (S~ + k~^T v)) exp(m)

D starts again in every chunk, so that q D and k D stay small. If the decay of a chunk is too strong, or if a
state is NaN or infinite, the whole scan runs again, as in the forward pass.
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
    only,
    sums_from_half,
    through_token,
    token_count,
)
from pallas_gla.triton.tiling import SHORTEST_CHUNK, TritonProgram, TritonTiling

Tile = Float[Array, "_ _"]
# A state and its tangent.
States = tuple[Float[Array, "v k"], Float[Array, "v k"]]
STATES = ("initial_state", "initial_state_dot")


def tangent_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the kernel for the named arrays. In a split scan it continues from `tangent_parts_kernel`."""

    def gla_tangent(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        states, _ = _run(program, lambda: _first_states(program))
        program.store_end_state("final_state_dot", states[1], tiling.parts - 1)

    return gla_tangent


def tangent_parts_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first pass over a split scan: each part's states from zero, and its sums of g and g_dot."""

    def gla_tangent_parts(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))

        def add(chunk: Int[Array, ""], decay: Decay, sums: tuple) -> tuple:
            log2_decay, moved = sums
            change = decay_dot(program, program.positions(chunk))
            if change is not None:
                _, before, after = sums_from_half(tiling, change)
                moved += before + after
            return log2_decay + decay.total, moved

        zero, none = program.zero_state(), Decay.zero_total(tiling)
        (state, state_dot), (log2_decay, moved) = _run(program, lambda: (zero, zero), add, (none, none))
        program.store_part(state, log2_decay)
        program.store_state("local_state_dot", program.local_state(program.part), state_dot)
        program.store_line("local_moved", program.program_index(program.part), jnp.max(moved, axis=0))

    return gla_tangent_parts


def _run(
    program: TritonProgram,
    first_states: Callable[[], States],
    add: Callable[[Int[Array, ""], Decay, tuple], tuple] = lambda *args: args[-1],
    sums: tuple = (),
) -> tuple[States, tuple]:
    """Run all chunks and store o_dot if the launch has it.

    Returns:
        The last states, and `sums` after `sums = add(chunk, decay, sums)` for every chunk.
    """

    def step(chunk: Int[Array, ""], carry: tuple) -> tuple:
        states, sums, fitness = carry
        decay = Decay.of(program, program.positions(chunk))
        states, sums = _by_products(program, chunk, decay, states), add(chunk, decay, sums)
        return states, sums, fitness.after(decay, _both(states))

    # A later segment may hide that a state was not finite.
    fitness = Fitness.of(program.tiling, program.tiling.value_width if program.tiling.segmented else None)
    states, sums, fitness = program.loop(step, (first_states(), sums, fitness))
    states = lax.cond(
        fitness.of_all(_both(states)),
        lambda states: states,
        lambda _: _run_slowly(program, first_states()),
        states,
    )
    return states, sums


def _run_slowly(program: TritonProgram, states: States) -> States:
    """Run all chunks for any decay and any values, as in the forward pass."""
    if program.tiling.scan.gating is not None:
        return program.loop(lambda chunk, states: _by_token(program, chunk, states), states)
    short = program.of_chunks(SHORTEST_CHUNK)

    def step(chunk: Int[Array, ""], states: States) -> States:
        return checked_chunk(short, chunk, states, _by_products, _by_token, _both)

    return short.loop(step, states)


def _both(states: States) -> Float[Array, "v k"]:
    """Return a tile that is not finite if one of the states is not."""
    return states[0] + states[1]


def _first_states(program: TritonProgram) -> States:
    """Return the states that enter a program's part."""
    first = tuple(
        program.load_state(name, program.end_state()) if name in program.refs else program.zero_state()
        for name in STATES
    )
    if program.tiling.parts == 1:
        return first[0], first[1]

    def through_part(part: Int[Array, ""], states: States) -> States:
        state, state_dot = states
        index, where = program.program_index(part), program.local_state(part)
        decay, moved = (program.load_line(name, index)[None, :] for name in ("local_decay", "local_moved"))
        state_dot = jnp.where(decay > 0, (state_dot + moved * state) * decay, 0.0)
        state_dot += program.load_state("local_state_dot", where)
        return program.through_part(part, state), state_dot

    return lax.fori_loop(jnp.int32(0), program.part, through_part, (first[0], first[1]))


def _by_token(program: TritonProgram, chunk: Int[Array, ""], states: States) -> States:
    """Run a chunk token by token."""

    def token(i: Int[Array, ""], states: States) -> States:
        return _token(program, chunk * program.tiling.chunk + i, states)

    return lax.fori_loop(jnp.int32(0), token_count(program, chunk), token, states)


def _by_products(program: TritonProgram, chunk: Int[Array, ""], decay: Decay, states: States) -> States:
    """Run a chunk by matrix products, store o_dot if the launch has it, and return the next states."""
    tiling, positions = program.tiling, program.positions(chunk)
    segments = ChunkSegments.of(program, chunk)
    change = decay_dot(program, positions)
    moved = (None, None, None) if change is None else sums_from_half(tiling, change)
    relative, before, after = moved

    k, v, v_dot = (load(program, name, positions) for name in ("k", "v", "v_dot"))
    assert k is not None and v is not None
    k = k.astype(jnp.float32)
    fade = tiling.exp2(-decay.relative)
    k_dot = plus(load(program, "k_dot", positions), None if relative is None else k * -relative)
    keys = (
        tiling.fixed(tiling.operand(k * fade)),
        None if k_dot is None else tiling.fixed(tiling.operand(k_dot * fade)),
    )
    state, state_dot = states
    enter = tiling.exp2(decay.before)
    state_dot = plus(state_dot, None if before is None else before * state) * enter
    state = state * enter
    outputs = None
    if "o_dot" in program.refs:
        outputs = _outputs(program, positions, decay, relative, segments, keys, (state, state_dot))
        if tiling.scan.gating is None:
            program.store("o_dot", positions, outputs[1])

    (k_tilde, k_tilde_dot), last = keys, None
    if segments is not None:
        last = segments.last
        state, state_dot = (jnp.where(segments.passes, x, 0.0) for x in (state, state_dot))
    state += tiling.dot(v, only(k_tilde, last), (0, 0))
    if k_tilde_dot is not None:
        state_dot += tiling.dot(v, only(k_tilde_dot, last), (0, 0))
    if v_dot is not None:
        state_dot += tiling.dot(v_dot, only(k_tilde, last), (0, 0))
    if after is not None:
        state_dot += after * state
    leave = tiling.exp2(decay.after)
    if outputs is not None and tiling.scan.gating is not None:
        gates = (load(program, name, positions) for name in ("out_gate", "out_gate_dot"))
        program.store("o_dot", positions, gated_dot(program, *outputs, *gates))
    return state * leave, state_dot * leave


def _outputs(
    program: TritonProgram,
    positions: Int[Array, " c"],
    decay: Decay,
    relative: Tile | None,
    segments: ChunkSegments | None,
    keys: tuple[Tile, Tile | None],
    states: States,
) -> tuple[Any, Any]:
    """Return o, which only a gate needs, and o_dot, from k~ and its tangent and S~ and its tangent.

    `relative` is the tangent of the decay until every token, without half the total.
    """
    tiling, (k_tilde, k_tilde_dot), (state, state_dot) = program.tiling, keys, states
    first = segments and segments.first
    q = program.load("q", positions).astype(jnp.float32)
    v, v_dot = (load(program, name, positions) for name in ("v", "v_dot"))
    assert v is not None
    grow = tiling.exp2(decay.relative) * tiling.scan.scale
    q_dot = plus(load(program, "q_dot", positions), None if relative is None else q * relative)
    q_tilde = tiling.operand(q * grow)
    q_tilde_dot = None if q_dot is None else tiling.operand(q_dot * grow)
    o: Any = None
    o_dot = tiling.dot(only(q_tilde, first), state_dot, (1, 1))
    scores_dot = None
    if q_tilde_dot is not None:
        o_dot += tiling.dot(only(q_tilde_dot, first), state, (1, 1))
        scores_dot = tiling.dot(q_tilde_dot, k_tilde, (1, 1))
    if k_tilde_dot is not None:
        scores_dot = plus(scores_dot, tiling.dot(q_tilde, k_tilde_dot, (1, 1)))
    if scores_dot is not None:
        o_dot += tiling.dot(causal(scores_dot, segments), v)
    gated = tiling.scan.gating is not None
    if gated or v_dot is not None:
        scores = tiling.operand(causal(tiling.dot(q_tilde, k_tilde, (1, 1)), segments))
        if v_dot is not None:
            o_dot += tiling.dot(scores, v_dot)
        if gated:
            o = tiling.dot(scores, v) + tiling.dot(only(q_tilde, first), state, (1, 1))
    return o, o_dot


def _token(program: TritonProgram, position: Int[Array, ""], states: States) -> States:
    """Run one token by the recurrence."""
    tiling = program.tiling
    state, state_dot = states

    def token(name: str) -> Float[Array, " n"] | None:
        return program.load_token(name, position) if name in program.refs else None

    change = token("g_dot")
    if change is not None:
        change = _decay_dot(tiling, program.load_token("g", position), change)
        state_dot += change[None, :] * state
    k, v, k_dot, v_dot = (token(name) for name in ("k", "v", "k_dot", "v_dot"))
    assert k is not None and v is not None
    state, state_dot = (through_token(program, position, x) for x in (state, state_dot))
    state += v[:, None] * k[None, :]
    if k_dot is not None:
        state_dot += v[:, None] * k_dot[None, :]
    if v_dot is not None:
        state_dot += v_dot[:, None] * k[None, :]
    if "o_dot" in program.refs:
        q, q_dot = token("q"), token("q_dot")
        assert q is not None
        product = state_dot * q[None, :]
        if q_dot is not None:
            product += state * q_dot[None, :]
        o_dot = jnp.sum(product, axis=1) * tiling.scan.scale
        if tiling.scan.gating is not None:
            o = jnp.sum(state * q[None, :], axis=1) * tiling.scan.scale
            gates = (token(name) for name in ("out_gate", "out_gate_dot"))
            gates = (None if x is None else x[None, :] for x in gates)
            o_dot = gated_dot(program, o[None, :], o_dot[None, :], *gates)[0]
        program.store_token("o_dot", position, o_dot)
    return state, state_dot


def decay_dot(program: TritonProgram, positions: Int[Array, " c"]) -> Tile | None:
    """Return the tangents of a chunk's log decays, or None if they are zero."""
    change = load(program, "g_dot", positions)
    tiling = program.tiling
    if change is None or tiling.scan.gating is None:
        return change
    return tiling.operand(_decay_dot(tiling, program.load("g", positions), change.astype(jnp.float32)))


def _decay_dot(
    tiling: TritonTiling, g: Float[Array, "..."], change: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Return the tangent of a log decay, given that of the log decay or, in a gated scan, of its logits."""
    if tiling.scan.gating is None:
        return change
    return change * tiling.sigmoid(-g.astype(jnp.float32)) * (1 / tiling.scan.gating.normalizer)


def gated_dot(program: TritonProgram, o: Tile, o_dot: Tile, gate: Tile | None, gate_dot: Tile | None) -> Tile:
    """Return the tangent of RMSNorm(o) * norm_weight * SiLU(gate)."""
    tiling, gating = program.tiling, program.tiling.scan.gating
    assert gating is not None and gate is not None
    weight = program.load_line("norm_weight", program.element)[None, :]
    inverse = lax.rsqrt(jnp.sum(o * o, axis=1, keepdims=True) * (1 / tiling.values) + gating.eps)
    along = jnp.sum(o * o_dot, axis=1, keepdims=True) * (inverse * inverse * (1 / tiling.values))
    gate = gate.astype(jnp.float32)
    sigmoid = tiling.sigmoid(gate)
    silu = gate * sigmoid
    moved = (o_dot - o * along) * silu
    if gate_dot is not None:
        moved += o * (gate_dot.astype(jnp.float32) * (sigmoid + silu * (1 - sigmoid)))
    moved *= weight
    if "norm_weight_dot" in program.refs:
        moved += o * (program.load_line("norm_weight_dot", program.element)[None, :] * silu)
    return moved * inverse


def load(program: TritonProgram, name: str, positions: Int[Array, " c"]) -> Tile | None:
    """Load a tile, or return None if the launch has no such array."""
    return program.load(name, positions) if name in program.refs else None


def plus(x: Tile | None, y: Tile | None) -> Any:
    """Return x + y in float32, where None is zero."""
    tiles = [z.astype(jnp.float32) for z in (x, y) if z is not None]
    return sum(tiles[1:], tiles[0]) if tiles else None
