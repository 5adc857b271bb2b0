"""The backward kernels for GPUs.

A program follows one head from its last chunk to its first. It keeps the gradient D of the transposed state
in registers and reads the states that entered the chunks. With q~, k~, S~ and the middle m of `forward`,
A = tril(q~ k~^T), P = tril(dO v^T) and D~ = D exp(G_last - m):

    dv = A^T dO + k~ D~      dq = (P k~ + dO S~) scale exp(G - m)      dk = (P^T q~ + v D~) exp(m - G)
    dS~ = D~ + dO^T q~       dS = dS~ exp(m)
    dg_t = sum_v S~ dS~ - sum_{s < t} (q~ dq~ - k~ dk~)_s

The decay of a token affects what this token and later ones read from the state before it. At the chunk's
start this is the first sum; every token then adds its key and removes what only its query read. The sums stay
within a chunk and use the numbers as rounded for the products, so that terms that should cancel do.
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
    causal,
    next_state,
    only,
    run_part,
    token_count,
    token_decay,
)
from pallas_gla.triton.tiling import TritonProgram, TritonTiling, iota, pick

State = Float[Array, "v k"]


def backward_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the kernel for the named arrays. In a split scan it starts from the first pass's results."""

    def gla_backward(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        d_state = _last_gradient(program)
        d_state = program.loop(lambda i, d_state: _chunk(program, i, d_state), d_state, backward=True)
        if "d_initial_state" in names:
            program.store_end_state("d_initial_state", d_state, 0)

    return gla_backward


def backward_parts_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first pass over a split scan: the gradient of each part's incoming state, from zero."""

    def gla_backward_parts(*refs: Any) -> None:
        run_part(TritonProgram.current(tiling, dict(zip(names, refs, strict=True))), _chunk, backward=True)

    return gla_backward_parts


def ungate_kernel(tiling: TritonTiling, names: tuple[str, ...]) -> Callable[..., None]:
    """Return the first launch of a gated scan: the gradient of o from "d_out", one program per chunk.

    Inside `backward_kernel`, the tiles of o, the gate and their gradients would not fit in registers.
    """

    def gla_ungate(*refs: Any) -> None:
        program = TritonProgram.current(tiling, dict(zip(names, refs, strict=True)))
        positions = program.positions(program.part)
        decay = Decay.of(program, positions)
        here = _Chunk(program, program.part, positions, decay)
        lax.cond(decay.bounded, here.ungate, here.ungate_safe)

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


def _chunk(program: TritonProgram, chunk: Int[Array, ""], d_state: State) -> State:
    """Run a chunk, store its gradients if the launch has them, and return the gradient of its state."""
    positions = program.positions(chunk)
    decay = Decay.of(program, positions)
    here = _Chunk(program, chunk, positions, decay)
    # The fast form always runs (see `forward._chunk`); it stores nothing if the decay is not bounded.
    return lax.cond(
        decay.bounded,
        lambda _, fast: fast,
        lambda d_state, _: here.safe(d_state),
        d_state,
        here.fast(d_state),
    )


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """One chunk."""

    program: TritonProgram
    chunk: Int[Array, ""]
    positions: Int[Array, " c"]
    decay: Decay

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

    def ungate(self) -> None:
        """Recompute o; store the gradients of o, the gate and norm_weight."""
        program, tiling = self.program, self.program.tiling
        segments = ChunkSegments.of(program, self.chunk)
        q_tilde, k_tilde, state = self.decayed()
        scores = causal(tiling.dot(q_tilde, k_tilde, (1, 1)), segments)
        v = program.load("v", self.positions)
        o = tiling.dot(scores, v) + tiling.dot(only(q_tilde, segments and segments.first), state, (1, 1))
        gate, d_out = program.load("out_gate", self.positions), program.load("d_out", self.positions)
        d_o, d_gate, d_weight = gated_gradients(program, o, gate, d_out)
        # In this order the launch takes 168 registers, the most that allow three programs per core.
        program.store("d_out_gate", self.positions, d_gate)
        program.store("d_o", self.positions, d_o)
        program.store_line("d_norm_weight", program.program_index(program.part), d_weight)

    def ungate_safe(self) -> None:
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
            return state, d_weight + d_weight_here

        carry = (self.state(), jnp.zeros((tiling.value_width,), jnp.float32))
        _, d_weight = lax.fori_loop(jnp.int32(0), token_count(program, self.chunk), token, carry)
        program.store_line("d_norm_weight", program.program_index(program.part), d_weight)

    def fast(self, d_state: State) -> State:
        """Store the gradients of a chunk if its decay is bounded; return the gradient of its state."""
        program, positions, decay = self.program, self.positions, self.decay
        tiling = program.tiling
        segments = ChunkSegments.of(program, self.chunk)
        first, last = (None, None) if segments is None else (segments.first, segments.last)
        q_tilde, k_tilde, state = self.decayed()
        d_o = program.load("d_o", positions)
        d_state = tiling.times_exp2(d_state, decay.after)
        if self.with_gradients:
            scores = causal(tiling.dot(k_tilde, q_tilde, (1, 1)), segments, query_axis=1)
            d_v = tiling.dot(scores, d_o) + tiling.dot(only(k_tilde, last), d_state, (1, 1))
            program.store("d_v", positions, d_v, decay.bounded)
            v = program.load("v", positions)
            d_scores = causal(tiling.dot(d_o, v, (1, 1)), segments)
            d_q = tiling.dot(d_scores, k_tilde) + only(tiling.dot(d_o, state), first)
            d_query = tiling.times_exp2(d_q * tiling.scan.scale, decay.relative)
            program.store("d_q", positions, d_query, decay.bounded)
            terms = tiling.widen(q_tilde) * d_q
            d_k = tiling.dot(d_scores, q_tilde, (0, 0)) + only(tiling.dot(v, d_state), last)
            program.store("d_k", positions, tiling.times_exp2(d_k, -decay.relative), decay.bounded)
            terms -= tiling.widen(k_tilde) * d_k
        if segments is not None:
            d_state = jnp.where(segments.passes, d_state, 0.0)
        d_state += tiling.dot(d_o, only(q_tilde, first), (0, 0))
        if self.with_gradients:
            through = tiling.widen(state) * d_state
            d_g = -tiling.sum_before(terms) + tiling.sum_values(through)
            # Decays at segment starts have no effect; set their gradient to exactly zero.
            d_g = only(d_g, segments and segments.continues)
            d_g = logit_gradients(program, d_g, program.load("g", positions))
            program.store("d_g", positions, d_g, decay.bounded)
        return tiling.times_exp2(d_state, decay.before)

    def safe(self, d_state: State) -> State:
        """Run `fast` token by token: the gradient of q forwards, the others backwards."""
        program, scale = self.program, self.program.tiling.scan.scale
        start, count = self.chunk * program.tiling.chunk, token_count(program, self.chunk)

        def forwards(i: Int[Array, ""], carry: tuple) -> tuple:
            state, terms = carry
            state = next_state(program, start + i, state)
            d_q = jnp.sum(state * program.load_token("d_o", start + i)[:, None], axis=0) * scale
            program.store_token("d_q", start + i, d_q)
            return state, set_row(terms, i, program.load_token("q", start + i) * d_q)

        def backwards(i: Int[Array, ""], carry: tuple) -> tuple:
            d_state, d_g = carry
            i = count - 1 - i
            decay = token_decay(program, start + i)
            q, d_o = program.load_token("q", start + i) * scale, program.load_token("d_o", start + i)
            d_state += d_o[:, None] * q[None, :]
            if self.with_gradients:
                k, v = program.load_token("k", start + i), program.load_token("v", start + i)
                d_k = jnp.sum(d_state * v[:, None], axis=0)
                program.store_token("d_k", start + i, d_k)
                program.store_token("d_v", start + i, jnp.sum(d_state * k[None, :], axis=1))
                d_g = jnp.where(decay > 0, d_g + pick(terms, i) - k * d_k, 0.0)
                g = program.load_token("g", start + i)
                program.store_token("d_g", start + i, logit_gradients(program, d_g, g))
            return d_state * decay[None, :], d_g

        terms = jnp.zeros_like(self.decay.relative)
        d_g = jnp.zeros(terms.shape[1:], jnp.float32)
        if self.with_gradients:
            carry = (self.state(), terms)
            state, terms = lax.fori_loop(jnp.int32(0), count, forwards, carry)
            d_g = jnp.sum(d_state * state, axis=0)
        return lax.fori_loop(jnp.int32(0), count, backwards, (d_state, d_g))[0]


def set_row(tile: Float[Array, "c n"], i: Int[Array, ""], row: Float[Array, " n"]) -> Float[Array, "c n"]:
    """Return the tile with row i replaced."""
    return jnp.where(iota(tile.shape, 0) == i, row[None, :], tile)


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
) -> tuple[Float[Array, "c v"], Float[Array, "c v"], Float[Array, " v"]]:
    """Return the gradients of `forward.gated` for o, the gate and norm_weight."""
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
    return d_o, d_gate * weight, jnp.sum(d_scaled * normed, axis=0)
