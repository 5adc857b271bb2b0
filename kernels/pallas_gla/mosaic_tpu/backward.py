"""The TPU kernel's backward pass over the chunks of one grid step, last chunk first.

In the notation of `forward`, with D the gradient of the outgoing state, D~ = exp(L - M) D and
dA = mask(dO v^T):

    dv  = A^T dO + k~ D~^T,   dq~ = dA k~ + dO S~,   dk~ = dA^T q~ + v D~
    D  <- exp(M) (D~ + dO^T q~)

The decay of token t affects everything that t and later tokens read from the state before t. At the chunk's
start this is sum_v S~ (D~ + dO^T q~); every token then adds its key and removes what only its query read:
dg_t = that sum - sum_{s < t} (q~ dq~ - k~ dk~)_s. All terms use the same rounded numbers, so that errors do
not grow along the sequence. Where all channels of a head decay strongly, dg is small and this difference
would be noise; such steps run by bisection.

The bisection for strong decays instead differentiates the sums of each level and subtracts nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.mosaic_tpu import forward as fwd
from pallas_gla.mosaic_tpu import nonfinite, tiles
from pallas_gla.mosaic_tpu.tiles import HeadGroup, TpuTiling
from pallas_gla.scan import Gating


def backward_kernel(refs: dict[str, Any], tiling: TpuTiling, scale: float, gating: Gating | None) -> None:
    """Run one grid step, (batch, heads, chunks). The names of `refs` are listed in `launch.FORMS`."""
    step = pl.program_id(2)
    state_ref: Any = refs["state"]
    weight_ref: Any = refs.get("d_norm_weight")
    before, after = step & 1, (step + 1) & 1

    @pl.when(step == 0)
    def _() -> None:
        state_ref[0] = refs["d_final_state"][...]
        if gating is not None:
            weight_ref[...] = jnp.zeros(weight_ref.shape, jnp.float32)

    d_states = {group: state_ref[before, :, group.keys] for group in tiling.groups}
    d_weights: dict[HeadGroup, Any] = dict.fromkeys(tiling.groups, 0.0)
    i, j = tiling.positions()
    sum_to, sum_before = fwd.to_token(tiling), j < i
    causal, anticausal = {}, {}
    for group in tiling.groups:
        row, lane = tiling.positions(group.heads)
        causal[group.heads], anticausal[group.heads] = lane <= row, lane >= row
    masks = (sum_to, sum_before, causal, anticausal)
    fast = _FactorizedStep(refs, tiling, scale, gating, *masks, d_states, d_weights, spans=[], decays={})
    tiles.emit_in_stages(
        fast.stages(chunk, group) for chunk in tiling.visits[::-1] for group in tiling.groups
    )
    for group, d_state in d_states.items():
        state_ref[after, :, group.keys] = d_state
    accurate = (fwd.largest(fast.spans) <= tiles.MAX_SPAN) & (fast.weakest_channels() <= tiles.MAX_DECAY)

    if gating is not None:

        @pl.when(accurate)
        def _() -> None:
            for group, d_weight in d_weights.items():
                weight_ref[:, group.values] += d_weight

    # NaN counts as inaccurate.
    @pl.when(jnp.logical_not(accurate))
    def _() -> None:
        _bisect_step(refs, tiling, scale, gating, before, after)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        refs["d_initial_state"][...] = state_ref[after]


@dataclasses.dataclass(frozen=True, eq=False)
class _FactorizedStep:
    """The factorized form of a grid step: its masks, and the results that its chunks accumulate."""

    refs: dict[str, Any]
    tiling: TpuTiling
    scale: float
    gating: Gating | None
    sum_to: Bool[Array, "c c"]
    sum_before: Bool[Array, "c c"]
    causal: dict[int, Any]
    anticausal: dict[int, Any]
    d_states: dict[HeadGroup, Any]
    d_weights: dict[HeadGroup, Any]
    spans: list[Float[Array, "1 _"]]
    decays: dict[HeadGroup, list[Float[Array, "1 _"]]]

    def weakest_channels(self) -> Float[Array, ""]:
        """Return the largest decay of a half chunk, in bits, in the channel of a head that decays least."""
        groups = (
            tiles.weakest_channels(self.tiling, group, jnp.concatenate(rows))
            for group, rows in self.decays.items()
        )
        return functools.reduce(jnp.maximum, groups)

    def stages(self, chunk: int, group: HeadGroup) -> Iterator[None]:
        """Emit the backward pass of one chunk and group, in stages that can be interleaved."""
        refs, tiling, gating, heads = self.refs, self.tiling, self.gating, group.heads
        first, total = fwd.decay_sums(refs, tiling, chunk, group, self.sum_to, gating)
        yield
        q, k, leave, enter, span = fwd.factorized(refs, tiling, chunk, group, first, total, self.scale)
        self.spans.append(span)
        middle, last = (fwd.row(total, r) for r in tiling.scan_rows[1:])
        self.decays.setdefault(group, []).extend((-middle, middle - last))
        v, d_o = (refs[name].load(chunk, group.values) for name in ("v", "d_o"))
        entered = (refs["states"][chunk, :, group.keys].astype(jnp.float32) * enter).astype(tiling.dtype)
        yield
        key_stack, query_stack = tiles.stack_heads(k, heads), tiles.stack_heads(q, heads)
        if gating is not None:
            scores = tiles.keep(self.causal[heads], tiling.dot(q, key_stack, "nt"))
            o = fwd.attend(tiling, group, scores, v) + fwd.read_state(tiling, group, q, entered)
            yield
            d_o, d_weight = _through_norm(refs, tiling, chunk, group, o, d_o, gating)
            self.d_weights[group] += d_weight
            yield
        scores_t = tiling.dot(k, query_stack, "nt")
        d_scores, d_scores_t = _pair_products(tiling, group, d_o, v), _pair_products(tiling, group, v, d_o)
        from_queries = tiles.fold_heads(tiling.dot(d_o, q, "tn"), heads)
        yield
        scores_t, d_scores_t = (tiles.keep(self.anticausal[heads], x) for x in (scores_t, d_scores_t))
        d_scores = tiles.keep(self.causal[heads], d_scores)
        left = self.d_states[group] * leave
        both = left + from_queries
        self.d_states[group] = both * enter
        d_v = fwd.attend(tiling, group, scores_t, d_o) + fwd.read_state(tiling, group, k, left)
        refs["d_v"].store(chunk, group.values, d_v)
        d_q = tiling.dot(d_scores, key_stack) + _write_state(tiling, group, d_o, entered)
        d_k = tiling.dot(d_scores_t, query_stack) + _write_state(tiling, group, v, left)
        yield
        through = jnp.sum(entered.astype(jnp.float32) * both, axis=0, keepdims=True)
        # The first depends on all q, d_o and both states, the second on all k and v.
        self.spans.extend((fwd.check(through, 0), fwd.check(d_q, tiling.scan_rows[2])))
        difference = q.astype(jnp.float32) * d_q - k.astype(jnp.float32) * d_k
        d_g = through - tiling.sums(self.sum_before, difference, parts=3)
        refs["d_q"].store(chunk, group.keys, d_q * fwd.query_factor(total, middle, self.scale))
        refs["d_k"].store(chunk, group.keys, d_k * jnp.exp2(middle - total))
        yield
        _store_decay(refs, chunk, group, d_g, gating)


def _bisect_step(
    refs: dict[str, Any],
    tiling: TpuTiling,
    scale: float,
    gating: Gating | None,
    before: Int[Array, ""],
    after: Int[Array, ""],
) -> None:
    """Run the step for any decay, overwriting the results of the factorized form."""
    state_ref = refs["state"]
    state_ref[after] = state_ref[before]

    def run(chunk: Int[Array, ""]) -> None:
        for group in tiling.groups:
            _bisect_chunk(refs, tiling, chunk, group, scale, gating, after)

    tiles.for_chunks(tiling, run, last_first=True)


def _bisect_chunk(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: Int[Array, ""],
    group: HeadGroup,
    scale: float,
    gating: Gating | None,
    slot: Int[Array, ""],
) -> None:
    numbers = nonfinite.finite_inputs(refs)
    g = fwd.any_decay(refs, tiling, chunk, group, gating)
    reach = nonfinite.Reach(tiling, group, refs, chunk, g)
    q = numbers["q"].load(chunk, group.keys, jnp.float32) * scale
    k = numbers["k"].load(chunk, group.keys, jnp.float32)
    v, d_o = (numbers[name].load(chunk, group.values) for name in ("v", "d_o"))
    state = refs["states"][chunk, :, group.keys].astype(jnp.float32)
    d_state = refs["state"][slot, :, group.keys]
    seen = reach.seen(state)
    lost = nonfinite.flags(refs["d_o"].load(chunk, group.values))
    lost += 0.0 if gating is None else reach.lost(seen)
    readers = reach.readers(lost)
    needed = reach.needed(readers, d_state)
    g, state, d_state = map(nonfinite.finite, (g, state, d_state))
    from_start, to_end = fwd.block_sums(tiling, g, tiles.levels(tiling.chunk))
    decay = jnp.exp2(fwd.row(from_start, tiling.scan_rows[2]))
    queries, keys = q * jnp.exp2(from_start), k * jnp.exp2(to_end)
    scores = fwd.bisected_scores(tiling, group, q, k, g)
    if gating is not None:
        o = fwd.attend(tiling, group, scores, v) + fwd.read_state(tiling, group, queries, state)
        d_o, d_weight = _through_norm(numbers, tiling, chunk, group, o, d_o, gating, reach.on_values(readers))
        refs["d_norm_weight"][:, group.values] += d_weight
    d_v = _gather(tiling, group, scores, d_o) + fwd.read_state(tiling, group, keys, d_state)
    refs["d_v"].store(chunk, group.values, nonfinite.mark(reach.on_values(needed + reach.writers), d_v))

    # First the terms that cross the chunk's ends, then the pairs inside it, by distance.
    d_queries = _write_state(tiling, group, d_o, state)
    d_keys = _write_state(tiling, group, v, d_state)
    d_g = _sum_gradients(tiling, tiles.levels(tiling.chunk), queries * d_queries, keys * d_keys)
    d_g += jnp.sum(state * d_state, axis=0, keepdims=True) * decay
    d_scores = _pair_products(tiling, group, d_o, v)
    d_q, d_k = d_queries * jnp.exp2(from_start), d_keys * jnp.exp2(to_end)
    d_q, d_k, d_g = _add_pairs(tiling, group, (q, k, g), d_scores, (d_q, d_k, d_g))
    refs["d_q"].store(chunk, group.keys, nonfinite.mark(seen + readers, d_q * scale))
    refs["d_k"].store(chunk, group.keys, nonfinite.mark(needed + reach.writers, d_k))
    _store_decay(refs, chunk, group, nonfinite.mark(seen + needed, d_g), gating)
    update = tiles.fold_heads(tiling.dot(d_o, queries, "tn"), group.heads)
    refs["state"][slot, :, group.keys] = nonfinite.mark(reach.incoming(needed), d_state * decay + update)


def _add_pairs(
    tiling: TpuTiling,
    group: HeadGroup,
    inputs: tuple[Float[Array, "c w"], ...],
    d_scores: Float[Array, "c n"],
    sums: tuple[Float[Array, "c w"], ...],
) -> tuple[Float[Array, "c w"], ...]:
    """Add the gradients of (q, k, g) through the pairs inside the chunk."""
    q, k, g = inputs
    d_q, d_k, d_g = sums
    i, j = tiling.positions(group.heads)
    diagonal = tiles.keep(i == j, d_scores)
    d_q += tiling.dot(diagonal, tiles.stack_heads(k, group.heads))
    d_k += tiles.fold_heads(tiling.dot(diagonal, q, "tn"), group.heads)

    def add(level: Int[Array, ""], sums: tuple[Float[Array, "c w"], ...]) -> tuple[Float[Array, "c w"], ...]:
        d_q, d_k, d_g = sums
        from_start, to_end = (jnp.exp2(x) for x in fwd.block_sums(tiling, g, level))
        queries, keys = q * from_start, k * to_end
        pairs = tiles.keep(tiles.pair_masks(i, j, level), d_scores)
        d_queries = tiling.dot(pairs, tiles.stack_heads(keys, group.heads))
        d_keys = tiles.fold_heads(tiling.dot(pairs, queries, "tn"), group.heads)
        d_g += _sum_gradients(tiling, level, queries * d_queries, keys * d_keys)
        return d_q + d_queries * from_start, d_k + d_keys * to_end, d_g

    return tiles.loop(tiles.levels(tiling.chunk), add, (d_q, d_k, d_g))


def _pair_products(
    tiling: TpuTiling, group: HeadGroup, x: Float[Array, "c w"], y: Float[Array, "c w"]
) -> Float[Array, "c n"]:
    """Return x y^T of every head, side by side, for tiles of values."""
    together = fwd.heads_together(tiling, group)
    parts = []
    for start in range(0, group.heads, together):
        heads = min(together, group.heads - start)
        lanes = slice(start * tiling.value_width, (start + heads) * tiling.value_width)
        stack = tiles.stack_heads(y[:, lanes], heads)
        parts.append(tiling.dot(x[:, lanes], stack, "nt"))
    return tiles.side_by_side(parts)


def _write_state(
    tiling: TpuTiling, group: HeadGroup, x: Float[Array, "c vw"], state: Float[Array, "v w"]
) -> Float[Array, "c w"]:
    """Multiply every head's values by its transposed state."""
    return tiling.dot(x, tiles.stack_heads(state, group.heads))


def _gather(
    tiling: TpuTiling, group: HeadGroup, scores: Float[Array, "c n"], x: Float[Array, "c vw"]
) -> Float[Array, "c vw"]:
    """Multiply every head's transposed scores by its values."""
    # The product has blocks for all pairs of heads; keep the diagonal ones.
    return tiles.fold_heads(tiling.dot(scores, x, "tn"), group.heads)


def _sum_gradients(
    tiling: TpuTiling,
    level: Int[Array, ""] | int,
    from_start: Float[Array, "c w"],
    to_end: Float[Array, "c w"],
) -> Float[Array, "c w"]:
    """Apply the transpose of `block_sums`."""
    i, j = tiling.positions()
    to, after = tiles.sum_masks(j, i, level)
    return tiling.sums(to, from_start) + tiling.sums(after, to_end)


def _store_decay(
    refs: dict[str, Any],
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    d_g: Float[Array, "c w"],
    gating: Gating | None,
) -> None:
    """Store the gradient of the decay or, in a gated scan, of its logits."""
    if gating is not None:
        d_g *= fwd.decay_slope(refs, chunk, group, gating)
    refs["d_g"].store(chunk, group.keys, d_g)


def _through_norm(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    o: Float[Array, "c w"],
    d_out: Float[Array, "c w"],
    gating: Gating,
    lost: Float[Array, "c w"] | None = None,
) -> tuple[Float[Array, "c w"], Float[Array, "1 w"]]:
    """Store the gradient of the gate; return the gradients of o, in the products' dtype, and norm_weight.

    The gradients of the gate and norm_weight become NaN where o is lost.
    """
    z = refs["out_gate"].load(chunk, group.values, jnp.float32)
    weight = refs["norm_weight"][:, group.values]
    d_out = d_out.astype(jnp.float32)
    inverse = fwd.inverse_norm(tiling, group, o, gating)
    sigmoid = tiles.sigmoid(z)
    normal, gate = o * inverse, z * sigmoid
    d_weight = d_out * normal
    if lost is not None:
        d_weight = nonfinite.mark(lost, d_weight)
    refs["d_out_gate"].store(chunk, group.values, d_weight * weight * (sigmoid + gate * (1.0 - sigmoid)))
    d_normal = d_out * weight * gate
    mean = fwd.head_means(tiling, group, d_normal * normal)
    d_o = inverse * (d_normal - normal * mean)
    return d_o.astype(tiling.dtype), jnp.sum(d_weight * gate, axis=0, keepdims=True)
