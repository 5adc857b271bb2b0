"""The TPU kernel's tangent over the chunks of one grid step: the forward pass and its derivative together.

With the names of `pallas_gla.mosaic_tpu.forward`, a dot for tangents, D the sum of g_dot after the chunk's
first token, D_M and D_L its value in the middle and at the end, and g_0_dot the first token's:

    a~ = scale (q_dot + q (D - D_M)) exp(G - M),     b~ = (k_dot - k (D - D_M)) exp(M - G)
    S~_dot = (S_dot + (g_0_dot + D_M) S) exp(g_0 + M)
    o_dot = mask(a~ k~^T + q~ b~^T) v + mask(q~ k~^T) v_dot + a~ S~^T + q~ S~_dot^T
    S_dot <- exp(L - M) (S~_dot + v^T b~ + v_dot^T k~ + (D_L - D_M) (S~ + v^T k~))

D starts again in every chunk, so that q D and k D stay small. If decays are strong, or if a result is NaN or
infinite, the step runs again by bisection: a pair (i, j) in neighboring blocks has D_i - D_j = F_i + E_j, a
sum from the start of i's block to i and a sum from j + 1 to the end of j's block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_gla.mosaic_tpu import nonfinite, tiles
from pallas_gla.mosaic_tpu.forward import (
    any_decay,
    attend,
    attend_to_all,
    block_sums,
    check,
    decay_slope,
    decay_sums,
    factorized,
    head_means,
    largest,
    query_factor,
    row,
    to_token,
)
from pallas_gla.mosaic_tpu.tiles import HeadGroup, TpuTiling
from pallas_gla.scan import Gating

# Keys and values have different widths.
Tile = Float[Array, "_ _"]
# The two states that a step carries.
STATES = ("state", "state_dot")


def tangent_kernel(refs: dict[str, Any], tiling: TpuTiling, scale: float, gating: Gating | None) -> None:
    """Run one grid step, (batch, heads, chunks). The names of `refs` are listed in `launch.FORMS`."""
    step = pl.program_id(2)
    before, after = step & 1, (step + 1) & 1

    @pl.when(step == 0)
    def _() -> None:
        _set_initial_states(refs)

    states = {group: tuple(refs[name][before, :, group.keys] for name in STATES) for group in tiling.groups}
    spans = []
    sum_to = to_token(tiling)
    causal = {group.heads: jnp.greater_equal(*tiling.positions(group.heads)) for group in tiling.groups}

    def stages(chunk: int, group: HeadGroup) -> Iterator[None]:
        first, total = decay_sums(refs, tiling, chunk, group, sum_to, gating)
        change = decay_dot(refs, tiling, chunk, group, gating)
        moved = None if change is None else tiling.sums(sum_to, change)
        yield
        q, k, leave, enter, span = factorized(refs, tiling, chunk, group, first, total, scale)
        spans.append(span)
        middle, last = (row(total, r) for r in tiling.scan_rows[1:])
        start_dot = rest = relative = None
        if change is not None and moved is not None:
            middle_dot, last_dot = (row(moved, r) for r in tiling.scan_rows[1:])
            start_dot = row(change, tiling.scan_rows[0]).astype(jnp.float32) + middle_dot
            relative, rest = moved - middle_dot, last_dot - middle_dot
        q_dot, k_dot = numerators(refs, chunk, group, relative, relative)
        q_dot = times(q_dot, query_factor(total, middle, scale), tiling)
        k_dot = times(k_dot, jnp.exp2(middle - total), tiling)
        yield
        v, v_dot = (load(refs, name, chunk, group.values) for name in ("v", "v_dot"))
        assert v is not None
        pairs = products(tiling, group, (q, q_dot), (k, k_dot), gating is not None or v_dot is not None)
        update, update_dot = states_update(tiling, group, (v, v_dot), (k, k_dot))
        yield
        pairs = [None if x is None else tiles.keep(causal[group.heads], x) for x in pairs]
        state, state_dot = states[group]
        entered = state * enter
        entered_dot = plus(state_dot, times(start_dot, state)) * enter
        summed = entered + update
        summed_dot = plus(plus(entered_dot, times(rest, summed)), update_dot)
        states[group] = (summed * leave, summed_dot * leave)
        outputs = results(tiling, group, pairs, (v, v_dot), (q, q_dot), (entered, entered_dot), gating)
        spans.append(check(outputs[1], tiling.scan_rows[2]))
        yield
        finish(refs, tiling, chunk, group, *outputs, gating)

    tiles.emit_in_stages(stages(chunk, group) for chunk in tiling.visits for group in tiling.groups)
    for group, pair in states.items():
        for name, state in zip(STATES, pair, strict=True):
            refs[name][after, :, group.keys] = state

    # NaN counts as unbounded.
    @pl.when(jnp.logical_not(largest(spans) <= tiles.MAX_SPAN))
    def _() -> None:
        _bisect_step(refs, tiling, scale, gating, before, after)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        refs["final_state_dot"][...] = refs["state_dot"][after]


def _set_initial_states(refs: dict[str, Any]) -> None:
    for name, initial in zip(STATES, ("initial_state", "initial_state_dot"), strict=True):
        ref, start = refs[name], refs.get(initial)
        ref[0] = jnp.zeros(ref.shape[1:], jnp.float32) if start is None else start[...]


def _bisect_step(
    refs: dict[str, Any],
    tiling: TpuTiling,
    scale: float,
    gating: Gating | None,
    before: Int[Array, ""],
    after: Int[Array, ""],
) -> None:
    """Run the step for any decay, overwriting the results of the factorized form."""
    numbers = nonfinite.finite_inputs(refs)
    for name in STATES:
        refs[name][after] = refs[name][before]

    def run(chunk: Int[Array, ""]) -> None:
        for group in tiling.groups:
            g = any_decay(refs, tiling, chunk, group, gating)
            reach = nonfinite.Reach(tiling, group, refs, chunk, g)
            states = [refs[name][after, :, group.keys] for name in STATES]
            seen = reach.seen(*states)
            g, state, state_dot = map(nonfinite.finite, (g, *states))
            change = decay_dot(numbers, tiling, chunk, group, gating)
            change = None if change is None else nonfinite.finite(change)
            q, k = (numbers[name].load(chunk, group.keys, jnp.float32) for name in ("q", "k"))
            v, v_dot = (load(numbers, name, chunk, group.values) for name in ("v", "v_dot"))
            assert v is not None
            pairs = _bisected_pairs(numbers, tiling, chunk, group, (q * scale, k), g, change, scale)
            from_start, to_end = block_sums(tiling, g, tiles.levels(tiling.chunk))
            moved = _moved(tiling, change, tiles.levels(tiling.chunk))
            q_dot, k_dot = numerators(numbers, chunk, group, *moved)
            leaving = jnp.exp2(to_end)
            reading = jnp.exp2(from_start) * scale
            queries = (q * reading, times(q_dot, reading))
            outputs = results(tiling, group, pairs, (v, v_dot), queries, (state, state_dot), gating)
            finish(numbers, tiling, chunk, group, *outputs, gating, reach.lost(seen))
            last = tiling.scan_rows[2]
            end = row(jnp.exp2(from_start), last)
            total = None if moved[0] is None else row(moved[0], last)
            keys = (k * leaving, times(k_dot, leaving))
            update, update_dot = states_update(tiling, group, (v, v_dot), keys)
            state_dot = plus(plus(state_dot, times(total, state)) * end, update_dot)
            for name, x in zip(STATES, (state * end + update, state_dot), strict=True):
                refs[name][after, :, group.keys] = nonfinite.mark(row(seen, last), x)

    tiles.for_chunks(tiling, run)


def _moved(
    tiling: TpuTiling, change: Tile | None, level: Int[Array, ""] | int
) -> tuple[Tile | None, Tile | None]:
    """Return F and -E, from a block's start to every token, and from there to its end."""
    if change is None:
        return None, None
    from_start, to_end = block_sums(tiling, change, level)
    return from_start, -to_end


def _bisected_pairs(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: Int[Array, ""],
    group: HeadGroup,
    operands: tuple[Tile, Tile],
    g: Tile,
    change: Tile | None,
    scale: float,
) -> list[Float[Array, "c n"]]:
    """Return scores of all pairs and their tangents, 0 for j > i, without exponents above 0."""
    q, k = operands
    i, j = tiling.positions(group.heads)

    def scores(factors: tuple[Tile, ...] | None, moved: tuple[Tile | None, Tile | None]) -> tuple:
        q_dot, k_dot = numerators(refs, chunk, group, *moved)
        reading, leaving = (None, None) if factors is None else factors
        queries = (times(q, reading), times(times(q_dot, reading), jnp.float32(scale)))
        keys = (times(k, leaving), times(k_dot, leaving))
        one, two = products(tiling, group, queries, keys, True)
        assert one is not None
        return one, jnp.zeros_like(one) if two is None else two

    def add(level: Int[Array, ""], found: tuple) -> tuple:
        factors = tuple(jnp.exp2(x) for x in block_sums(tiling, g, level))
        here = tiles.pair_masks(i, j, level)
        new = scores(factors, _moved(tiling, change, level))
        return tuple(jnp.where(here, x, y) for x, y in zip(new, found, strict=True))

    # A token's decay does not reach itself.
    start = tuple(tiles.keep(i == j, x) for x in scores(None, (None, None)))
    return list(jax.lax.fori_loop(jnp.int32(0), jnp.int32(tiles.levels(tiling.chunk)), add, start))


def decay_dot(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    gating: Gating | None,
) -> Tile | None:
    """Return the tangent of the log decay, or None if it is zero."""
    change = load(refs, "g_dot", chunk, group.keys)
    if change is None or gating is None:
        return change
    return (change.astype(jnp.float32) * decay_slope(refs, chunk, group, gating)).astype(tiling.dtype)


def numerators(
    refs: dict[str, Any],
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    for_queries: Tile | None,
    for_keys: Tile | None,
) -> tuple[Tile | None, Tile | None]:
    """Return q_dot + q D and k_dot - k D in float32, or None for zero."""
    results = []
    for name, sums, combine in (("q", for_queries, plus), ("k", for_keys, minus)):
        moved = None if sums is None else refs[name].load(chunk, group.keys, jnp.float32) * sums
        results.append(combine(load(refs, f"{name}_dot", chunk, group.keys, jnp.float32), moved))
    return results[0], results[1]


def products(
    tiling: TpuTiling,
    group: HeadGroup,
    queries: tuple[Tile, Tile | None],
    keys: tuple[Tile, Tile | None],
    with_scores: bool,
) -> list[Float[Array, "c n"] | None]:
    """Return the scores of all pairs, if wanted, and their tangent, or None if it is zero."""
    (q, q_dot), (k, k_dot) = queries, keys
    stacked = tiles.stack_heads(k, group.heads)
    stacked_dot = None if k_dot is None else tiles.stack_heads(k_dot, group.heads)
    scores = tiling.dot(q, stacked, "nt") if with_scores else None
    return [scores, product_dot(tiling, (q_dot, stacked), (q, stacked_dot))]


def product_dot(
    tiling: TpuTiling, one: tuple[Tile | None, Tile | None], two: tuple[Tile | None, Tile | None]
) -> Float[Array, "c n"] | None:
    """Return the sum of two products x y^T as one, which fills deep matrix units; None if all are zero."""
    pairs = [(x, y) for x, y in (one, two) if x is not None and y is not None]
    if not pairs:
        return None
    x, y = (tiles.side_by_side(side) for side in zip(*pairs, strict=True))
    return tiling.dot(x, y, "nt")


def states_update(
    tiling: TpuTiling, group: HeadGroup, values: tuple[Tile, Tile | None], keys: tuple[Tile, Tile | None]
) -> tuple[Float[Array, "v w"], Float[Array, "v w"] | None]:
    """Return the sum of the chunk's v^T k and its tangent, or None if it is zero, from one product."""
    v, v_dot, k, k_dot = (None if x is None else x.astype(tiling.dtype) for x in (*values, *keys))
    assert v is not None and k is not None
    if k_dot is None and v_dot is None:
        return tiles.fold_heads(tiling.dot(v, k, "tn"), group.heads), None
    zeros = jnp.zeros_like(k)
    rows = [tiles.side_by_side([k, zeros if k_dot is None else k_dot])]
    if v_dot is not None:
        rows.append(tiles.side_by_side([zeros, k]))
        v = jnp.concatenate([v, v_dot])
    both = tiling.dot(v, jnp.concatenate(rows), "tn")
    width = k.shape[1]
    return tiles.fold_heads(both[:, :width], group.heads), tiles.fold_heads(both[:, width:], group.heads)


def results(
    tiling: TpuTiling,
    group: HeadGroup,
    pairs: Sequence[Float[Array, "c n"] | None],
    values: tuple[Tile, Tile | None],
    queries: tuple[Tile, Tile | None],
    states: tuple[Tile, Tile],
    gating: Gating | None,
) -> tuple[Tile | None, Tile]:
    """Return o, if the scan is gated, and o_dot."""
    (scores, scores_dot), (v, v_dot), (q, q_dot), (state, state_dot) = pairs, values, queries, states
    stacked, stacked_dot = (tiles.stack_heads(x, group.heads) for x in (state, state_dot))
    o_dot = product_dot(tiling, (q_dot, stacked), (q, stacked_dot))
    assert o_dot is not None
    if scores_dot is not None:
        o_dot += attend(tiling, group, scores_dot, v)
    attending = [x for x in (None if gating is None else v, v_dot) if x is not None]
    if not attending:
        return None, o_dot
    assert scores is not None
    attended = attend_to_all(tiling, group, scores, attending)
    if v_dot is not None:
        o_dot += attended[-1]
    return None if gating is None else attended[0] + tiling.dot(q, stacked, "nt"), o_dot


def finish(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    o: Tile | None,
    o_dot: Tile,
    gating: Gating | None,
    lost: Tile | None = None,
) -> None:
    """Store o_dot or, in a gated scan, the tangent of RMSNorm(o) * norm_weight * SiLU(out_gate).

    It becomes NaN where it is lost.
    """
    if gating is not None:
        assert o is not None
        z = refs["out_gate"].load(chunk, group.values, jnp.float32)
        weight = refs["norm_weight"][:, group.values]
        sigmoid = tiles.sigmoid(z)
        silu = z * sigmoid
        means = head_means(tiling, group, jnp.concatenate([o * o, o * o_dot]))
        inverse = jax.lax.rsqrt(means[: tiling.chunk] + gating.eps)
        along = means[tiling.chunk :] * (inverse * inverse)
        moved = (o_dot - o * along) * silu
        z_dot = load(refs, "out_gate_dot", chunk, group.values, jnp.float32)
        if z_dot is not None:
            moved += o * (z_dot * (sigmoid + silu * (1.0 - sigmoid)))
        moved *= weight
        if "norm_weight_dot" in refs:
            moved += o * (refs["norm_weight_dot"][:, group.values] * silu)
        o_dot = moved * inverse
    refs["o_dot"].store(chunk, group.values, o_dot if lost is None else nonfinite.mark(lost, o_dot))


def load(
    refs: dict[str, Any], name: str, chunk: int | Int[Array, ""], lanes: slice, dtype: Any = None
) -> Tile | None:
    """Load a tile, or return None if the launch has no such array."""
    return refs[name].load(chunk, lanes, dtype) if name in refs else None


def plus(x: Tile | None, y: Tile | None) -> Any:
    """Return x + y, where None is zero."""
    return y if x is None else x if y is None else x + y


def minus(x: Tile | None, y: Tile | None) -> Any:
    """Return x - y, where None is zero."""
    return x if y is None else -y if x is None else x - y


def times(x: Tile | None, factor: Any, tiling: TpuTiling | None = None) -> Any:
    """Return x * factor, as a product's operand if `tiling` is given. None is a zero x or a factor of 1."""
    if x is None:
        return None
    product = x if factor is None else x * factor
    return product if tiling is None else product.astype(tiling.dtype)
