"""The backward kernels for GPUs.

A program follows one head from its last chunk to its first. It keeps the gradient D of the transposed state
in registers and reads the states that entered the chunks. With q~, k~, S~ and m of `forward`,
A = tril(q~ k~^T), P = tril(dO v^T) and D~ = D exp(m):

    dv = A^T dO + k~ D~      dq = (P k~ + dO S~) scale exp(G - m)      dk = (P^T q~ + v D~) exp(m - G)
    dS~ = D~ + dO^T q~       dS = dS~ exp(m)
    dg_t = sum_v S~ dS~ - sum_{s < t} (q~ dq~ - k~ dk~)_s

The decay of a token affects what this token and later ones read from the state before it. At the chunk's
start this is the first sum; every token then adds its key and removes what only its query read. The sums stay
within a chunk and use the numbers as rounded for the products, so that terms that should cancel do.

Where all channels decay strongly, dg is small and this difference would be noise; such scans, and all of
float32, run in the form of `levels`.
"""

import dataclasses
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
    next_state,
    only,
    through_token,
    token_count,
)
from pallas_gla.triton.levels import Levels, regular
from pallas_gla.triton.tiling import TritonProgram, TritonTiling

State = Float[Array, "v k"]
# A sum per value, in one or more equal columns.
Column = Float[Array, "v _"]


def backward_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the kernel for the named arrays. In a split scan it starts from the first pass's results."""

    def gla_backward(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        d_state, _ = _run(program, lambda: _last_gradient(program))
        if "d_initial_state" in names:
            program.store_end_state("d_initial_state", d_state, 0)

    return gla_backward


def backward_parts_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first pass over a split scan: the gradient of each part's incoming state, from zero."""

    def gla_backward_parts(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        d_state, log2_decay = _run(program, program.zero_state)
        assert log2_decay is not None
        program.store_part(d_state, log2_decay)

    return gla_backward_parts


def ungate_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first launch of a gated scan: the gradient of o from "d_out", a few chunks per program.

    Inside `backward_kernel`, the tiles of o, the gate and their gradients would not fit in registers.
    """

    def gla_ungate(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))

        def step(chunk: Int[Array, ""], carry: tuple[Column, Fitness]) -> tuple[Column, Fitness]:
            d_weight, fitness = carry
            here = _Chunk.at(program, chunk)
            return d_weight + here.ungate(), fitness.after(here.decay)

        def by_token(chunk: Int[Array, ""], d_weight: Column) -> Column:
            return d_weight + _Chunk.at(program, chunk).ungate_by_token()[:, None]

        nothing = tiling.sum_tokens(jnp.zeros((tiling.chunk, tiling.value_width), jnp.float32))
        d_weight, fitness = program.loop(step, (nothing, Fitness.of(tiling)))
        d_weight = lax.cond(
            fitness.bounded, lambda fast: fast, lambda _: program.loop(by_token, nothing), d_weight
        )
        program.store_line("d_norm_weight", program.program_index(program.part), jnp.max(d_weight, axis=1))

    return gla_ungate


def _last_gradient(program: TritonProgram) -> State:
    """Return the gradient of the state that leaves a program's part."""
    d_state = program.load_state("d_final_state", program.end_state())
    last = program.tiling.parts - 1
    if last == 0:
        return d_state
    return lax.fori_loop(
        jnp.int32(0), last - program.part, lambda i, d_state: program.through_part(last - i, d_state), d_state
    )


def _run(
    program: TritonProgram, last_gradient: Callable[[], State]
) -> tuple[State, Float[Array, "_ k"] | None]:
    """Run all chunks, and store the gradients that the launch has.

    If a chunk turns out to be unfit for the fast form, all chunks run again. In one loop with both forms, the
    slow one's constants would occupy registers of the fast one, and Triton copies the tiles of the next chunk
    to shared memory in advance only if their loads are not in a branch.

    Returns:
        The gradient of the first state and, in the first pass over a split scan, the total decay in rows.
    """
    tiling, with_gradients = program.tiling, "d_q" in program.refs

    def slow() -> State:
        return program.loop(
            lambda i, d_state: _slow_chunk(program, i, d_state), last_gradient(), backward=True
        )

    if tiling.dtype == jnp.float32 and with_gradients:
        return slow(), None

    def step(i: Int[Array, ""], carry: tuple) -> tuple:
        d_state, total, fitness = carry
        here = _Chunk.at(program, i)
        d_state, checked = here.fast(d_state)
        return (
            d_state,
            None if total is None else total + here.decay.total,
            fitness.after(here.decay, checked),
        )

    total = None if with_gradients else Decay.zero_total(tiling)
    fitness = Fitness.of(tiling, tiling.chunk if with_gradients else tiling.value_width, with_gradients)
    d_state, total, fitness = program.loop(step, (last_gradient(), total, fitness), backward=True)
    return lax.cond(fitness.of_all(d_state), lambda fast: fast, lambda _: slow(), d_state), total


def _slow_chunk(program: TritonProgram, chunk: Int[Array, ""], d_state: State) -> State:
    """Run `_Chunk.fast` for any decay and any values."""
    if "d_q" not in program.refs:
        return _state_gradient_by_token(program, chunk, d_state)
    tokens, positions = Levels.of(program, chunk), program.positions(chunk)
    state = program.load_state("states", program.chunk_state(chunk)).astype(jnp.float32)
    d_g = tokens.store_gradients(state, d_state)
    d_g = only(d_g, tokens.segments and tokens.segments.continues)
    program.store("d_g", positions, logit_gradients(program, d_g, program.load("g", positions)))
    return tokens.state_gradient(d_state)


def _state_gradient_by_token(program: TritonProgram, chunk: Int[Array, ""], d_state: State) -> State:
    """Return the gradient of a chunk's incoming state. `Levels` would take twice the registers."""
    count = token_count(program, chunk)

    def token(i: Int[Array, ""], d_state: State) -> State:
        position = chunk * program.tiling.chunk + count - 1 - i
        q = program.load_token("q", position) * program.tiling.scan.scale
        d_state += program.load_token("d_o", position)[:, None] * q[None, :]
        return through_token(program, position, d_state)

    return lax.fori_loop(jnp.int32(0), count, token, d_state)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One chunk."""

    program: TritonProgram
    chunk: Int[Array, ""]
    positions: Int[Array, " c"]
    decay: Decay

    @classmethod
    def at(cls, program: TritonProgram, chunk: Int[Array, ""]) -> "_Chunk":
        """Return the chunk of this number."""
        positions = program.positions(chunk)
        return cls(program, chunk, positions, Decay.of(program, positions))

    @property
    def with_gradients(self) -> bool:
        """Whether the launch stores more than the gradient of the state."""
        return "d_q" in self.program.refs

    def state(self) -> State:
        """Load the state that enters the chunk."""
        state = self.program.load_state("states", self.program.chunk_state(self.chunk))
        return state.astype(jnp.float32)

    def decayed(self) -> tuple[Float[Array, "c k"], Float[Array, "c k"], State]:
        """Return q~, k~ and S~, rounded for the products."""
        tiling, decay = self.program.tiling, self.decay
        q, k = self.program.load("q", self.positions), self.program.load("k", self.positions)
        q_tilde = tiling.times_exp2(q.astype(jnp.float32) * tiling.scan.scale, decay.relative)
        k_tilde = tiling.times_exp2(k.astype(jnp.float32), -decay.relative)
        state = tiling.times_exp2(self.state(), decay.before)
        return tiling.operand(q_tilde), tiling.operand(k_tilde), tiling.operand(state)

    def ungate(self) -> Column:
        """Recompute o, store the gradients of o and the gate, and return that of norm_weight."""
        program, tiling = self.program, self.program.tiling
        segments = ChunkSegments.of(program, self.chunk)
        q_tilde, k_tilde, state = self.decayed()
        state = tiling.fixed(state)
        scores = causal(tiling.dot(q_tilde, k_tilde, (1, 1)), segments)
        # In a product a NaN or infinity would reach the other tokens of o. `backward_kernel` reports it.
        v = regular(program.load("v", self.positions))
        o = tiling.dot(scores, v) + only(tiling.dot(q_tilde, state, (1, 1)), segments and segments.first)
        gate, d_out = program.load("out_gate", self.positions), program.load("d_out", self.positions)
        d_o, d_gate, d_weight = gated_gradients(program, o, gate, d_out)
        # The launch takes 168 registers, the most that allow three programs per core.
        program.store("d_out_gate", self.positions, d_gate)
        program.store("d_o", self.positions, d_o)
        return tiling.sum_tokens(d_weight)

    def ungate_by_token(self) -> Float[Array, " v"]:
        """Run `ungate` token by token."""
        program, tiling = self.program, self.program.tiling
        start = self.chunk * tiling.chunk

        def token(i: Int[Array, ""], carry: tuple) -> tuple:
            state, d_weight = carry
            state = next_state(program, start + i, state)
            o = jnp.sum(state * (program.load_token("q", start + i) * tiling.scan.scale)[None, :], axis=1)
            gate, d_out = (program.load_token(name, start + i)[None, :] for name in ("out_gate", "d_out"))
            d_o, d_gate, d_weight_here = gated_gradients(program, o[None, :], gate, d_out)
            program.store_token("d_o", start + i, d_o[0])
            program.store_token("d_out_gate", start + i, d_gate[0])
            return state, d_weight + d_weight_here[0]

        carry = (self.state(), jnp.zeros((tiling.value_width,), jnp.float32))
        return lax.fori_loop(jnp.int32(0), token_count(program, self.chunk), token, carry)[1]

    def fast(self, d_state: State) -> tuple[State, Float[Array, "_ k"]]:
        """Store the gradients of a chunk; return the gradient of its state and a tile that must be finite."""
        program, positions, decay = self.program, self.positions, self.decay
        tiling = program.tiling
        segments = ChunkSegments.of(program, self.chunk)
        first, last = (None, None) if segments is None else (segments.first, segments.last)
        q_tilde, k_tilde, state = self.decayed()
        q_tilde = tiling.fixed(q_tilde)
        d_o = program.load("d_o", positions)
        if self.with_gradients:
            d_q = only(tiling.dot(d_o, state), first)
        d_state = tiling.times_exp2(d_state, decay.after)
        if self.with_gradients:
            d_leaving = tiling.fixed(tiling.operand(d_state))
            scores = causal(tiling.dot(k_tilde, q_tilde, (1, 1)), segments, query_axis=1)
            d_v = tiling.dot(only(k_tilde, last), d_leaving, (1, 1))
            d_v += tiling.dot(scores, d_o)
            program.store("d_v", positions, d_v)
            v = program.load("v", positions)
            d_scores = causal(tiling.dot(d_o, v, (1, 1)), segments)
            d_q += tiling.dot(d_scores, k_tilde)
            d_query = tiling.times_exp2(d_q * tiling.scan.scale, decay.relative)
            program.store("d_q", positions, d_query)
            terms = tiling.widen(q_tilde) * d_q
            d_k = only(tiling.dot(v, d_leaving), last)
            d_k += tiling.dot(d_scores, q_tilde, (0, 0))
            program.store("d_k", positions, tiling.times_exp2(d_k, -decay.relative))
            terms -= tiling.widen(k_tilde) * d_k
        if segments is not None:
            d_state = jnp.where(segments.passes, d_state, 0.0)
        d_state += tiling.dot(d_o, only(q_tilde, first), (0, 0))
        if self.with_gradients:
            through = tiling.widen(state) * d_state
            d_g = -tiling.sum_before(terms) + tiling.sum_values(through)
            checked = d_g
            # Decays at segment starts have no effect; set their gradient to exactly zero.
            d_g = only(d_g, segments and segments.continues)
            d_g = logit_gradients(program, d_g, program.load("g", positions))
            program.store("d_g", positions, d_g)
        else:
            checked = d_state
        return tiling.times_exp2(d_state, decay.before), checked


def logit_gradients(
    program: TritonProgram, d_g: Float[Array, "*c k"], logits: Float[Array, "*c k"]
) -> Float[Array, "*c k"]:
    """Return the gradient of the decay or, in a gated scan, of its logits."""
    tiling = program.tiling
    if tiling.scan.gating is None:
        return d_g
    return d_g * (tiling.sigmoid(-logits.astype(jnp.float32)) * (1 / tiling.scan.gating.normalizer))


def gated_gradients(
    program: TritonProgram, o: Float[Array, "c v"], gate: Float[Array, "c v"], d_out: Float[Array, "c v"]
) -> tuple[Float[Array, "c v"], Float[Array, "c v"], Float[Array, "c v"]]:
    """Return the gradients of `forward.gated` for o, the gate and, not summed over tokens, norm_weight."""
    tiling, gating = program.tiling, program.tiling.scan.gating
    assert gating is not None
    weight = program.load_line("norm_weight", program.element)[None, :]
    mean = 1 / tiling.values
    factor = lax.rsqrt(jnp.sum(o * o, axis=1, keepdims=True) * mean + gating.eps)
    normed = o * factor
    gate, d_out = gate.astype(jnp.float32), d_out.astype(jnp.float32)
    sigmoid = tiling.sigmoid(gate)
    d_gate = d_out * normed * (sigmoid * (1 + gate * (1 - sigmoid)))
    d_scaled = d_out * (gate * sigmoid)
    d_normed = d_scaled * weight
    d_o = factor * (d_normed - normed * (jnp.sum(d_normed * normed, axis=1, keepdims=True) * mean))
    return d_o, d_gate * weight, d_scaled * normed
