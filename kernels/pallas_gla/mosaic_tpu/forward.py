"""The TPU kernel's forward pass over the chunks of one grid step.

Let G be the sum of decays after the chunk's first token, M its value in the middle and L its value at the
end, S the transposed incoming state, g_0 the decay of the first token, and i >= j tokens along the scan:

    q~ = scale q exp(G - M),   k~ = k exp(M - G),   S~ = S exp(g_0 + M)
    o = mask(q~ k~^T) v + q~ S~^T,   S <- exp(L - M) (S~ + v^T k~)

A token takes two exponentials; all else is matrix products (Yang et al. 2024, section 4.2). Taking the
reference in the middle halves the range of the exponents; leaving out g_0, which affects no pair inside the
chunk, allows it to be a reset. If decays in a step span more than `MAX_SPAN`, or if a result is NaN or
infinite, the step runs again by bisection: pairs (i, j) in neighboring blocks of 1, 2, 4, ... tokens decay by
a sum from j to the end of its block and a sum from the start of i's block, both <= 0.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.mosaic_tpu import nonfinite, tiles
from pallas_gla.mosaic_tpu.tiles import HeadGroup, TpuTiling
from pallas_gla.mosaic_tpu.tokens import LANES
from pallas_gla.scan import Gating


def forward_kernel(refs: dict[str, Any], tiling: TpuTiling, scale: float, gating: Gating | None) -> None:
    """Run one grid step, (batch, heads, chunks). The names of `refs` are listed in `launch.FORMS`."""
    step = pl.program_id(2)
    state_ref = refs["state"]
    before, after = step & 1, (step + 1) & 1

    @pl.when(step == 0)
    def _() -> None:
        initial = refs.get("initial_state")
        state_ref[0] = jnp.zeros(state_ref.shape[1:], jnp.float32) if initial is None else initial[...]

    states = {group: state_ref[before, :, group.keys] for group in tiling.groups}
    spans = []
    sum_to = to_token(tiling)
    causal = {group.heads: jnp.greater_equal(*tiling.positions(group.heads)) for group in tiling.groups}

    def stages(chunk: int, group: HeadGroup) -> Iterator[None]:
        first, total = decay_sums(refs, tiling, chunk, group, sum_to, gating)
        yield
        q, k, leave, enter, span = factorized(refs, tiling, chunk, group, first, total, scale)
        spans.append(span)
        yield
        v = refs["v"].load(chunk, group.values)
        scores = tiling.dot(q, tiles.stack_heads(k, group.heads), "nt")
        update = tiles.fold_heads(tiling.dot(v, k, "tn"), group.heads)
        yield
        scores = tiles.keep(causal[group.heads], scores)
        if "states" in refs:
            refs["states"][chunk, :, group.keys] = states[group].astype(refs["states"].dtype)
        entered = states[group] * enter
        states[group] = (entered + update) * leave
        o = attend(tiling, group, scores, v) + read_state(tiling, group, q, entered)
        spans.append(check(o, tiling.scan_rows[2]))
        yield
        finish(refs, tiling, chunk, group, o, gating)

    tiles.emit_in_stages(stages(chunk, group) for chunk in tiling.visits for group in tiling.groups)
    for group, state in states.items():
        state_ref[after, :, group.keys] = state

    # NaN counts as unbounded.
    @pl.when(jnp.logical_not(largest(spans) <= tiles.MAX_SPAN))
    def _() -> None:
        _bisect_step(refs, tiling, scale, gating, before, after)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        refs["final_state"][...] = state_ref[after]


def _bisect_step(
    refs: dict[str, Any],
    tiling: TpuTiling,
    scale: float,
    gating: Gating | None,
    before: Int[Array, ""],
    after: Int[Array, ""],
) -> None:
    """Run the step for any decay, overwriting the results of the factorized form."""
    state_ref, numbers = refs["state"], nonfinite.finite_inputs(refs)
    state_ref[after] = state_ref[before]

    def run(chunk: Int[Array, ""]) -> None:
        for group in tiling.groups:
            g = any_decay(refs, tiling, chunk, group, gating)
            q = numbers["q"].load(chunk, group.keys, jnp.float32) * scale
            k = numbers["k"].load(chunk, group.keys, jnp.float32)
            v = numbers["v"].load(chunk, group.values)
            state = state_ref[after, :, group.keys]
            if "states" in refs:
                refs["states"][chunk, :, group.keys] = state.astype(refs["states"].dtype)
            reach = nonfinite.Reach(tiling, group, refs, chunk, g)
            seen = reach.seen(state)
            g, state = nonfinite.finite(g), nonfinite.finite(state)
            from_start, to_end = block_sums(tiling, g, tiles.levels(tiling.chunk))
            scores = bisected_scores(tiling, group, q, k, g)
            o = attend(tiling, group, scores, v)
            o += read_state(tiling, group, q * jnp.exp2(from_start), state)
            finish(numbers, tiling, chunk, group, o, gating, reach.lost(seen))
            update = tiles.fold_heads(tiling.dot(v, k * jnp.exp2(to_end), "tn"), group.heads)
            end = tiling.scan_rows[2]
            decayed = state * jnp.exp2(row(from_start, end))
            state_ref[after, :, group.keys] = nonfinite.mark(row(seen, end), decayed + update)

    tiles.for_chunks(tiling, run)


def decay(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    gating: Gating | None,
) -> Float[Array, "c w"]:
    """Return the chunk's decays in multiples of `unit`."""
    if gating is None:
        return refs["g"].load(chunk, group.keys)
    # Rounding once to bfloat16 changes exp(-x) by at most 0.1 % and halves the products in its sums.
    return tiles.sigmoid_bits(refs["g"].load(chunk, group.keys, jnp.float32)).astype(tiling.dtype)


def any_decay(
    refs: dict[str, Any], tiling: TpuTiling, chunk: Int[Array, ""], group: HeadGroup, gating: Gating | None
) -> Float[Array, "c w"]:
    """Return the chunk's decays in bits, at least `NO_STATE` so that sums are finite."""
    g = decay(refs, tiling, chunk, group, gating).astype(jnp.float32) * unit(gating)
    # Not a maximum, which may ignore NaN.
    return jnp.where(g < nonfinite.NO_STATE, jnp.full((), nonfinite.NO_STATE, g.dtype), g)


def unit(gating: Gating | None) -> float:
    """Return the factor that converts `decay` to bits."""
    return tiles.BITS if gating is None else -1.0 / gating.normalizer


def decay_slope(
    refs: dict[str, Any], chunk: int | Int[Array, ""], group: HeadGroup, gating: Gating
) -> Float[Array, "c w"]:
    """Return the derivative of the log decay with respect to its logit, sigmoid(-logit) / normalizer."""
    half = 0.5 / gating.normalizer
    return half - half * jnp.tanh(0.5 * refs["g"].load(chunk, group.keys, jnp.float32))


def decay_sums(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int,
    group: HeadGroup,
    sum_to: Bool[Array, "c c"],
    gating: Gating | None,
) -> tuple[Float[Array, "1 w"], Float[Array, "c w"]]:
    """Return the decay of the chunk's first token, and from there to every token, in bits."""
    g = decay(refs, tiling, chunk, group, gating)
    first = row(g, tiling.scan_rows[0]).astype(jnp.float32) * unit(gating)
    return first, tiling.sums(sum_to, g, unit(gating))


def to_token(tiling: TpuTiling) -> Bool[Array, "c c"]:
    """Return, for every row's token, the mask of tokens up to it, without the chunk's first."""
    i, j = tiling.positions()
    return (j <= i) & (j > 0)


def factorized(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int,
    group: HeadGroup,
    first: Float[Array, "1 w"],
    total: Float[Array, "c w"],
    scale: float,
) -> tuple[
    Float[Array, "c w"], Float[Array, "c w"], Float[Array, "1 w"], Float[Array, "1 w"], Float[Array, "1 w"]
]:
    """Return q~ and k~ in the products' dtype, exp(L - M), exp(g_0 + M), and the decay from M to an end."""
    middle, last = (row(total, r) for r in tiling.scan_rows[1:])
    q = refs["q"].load(chunk, group.keys, jnp.float32) * query_factor(total, middle, scale)
    k = refs["k"].load(chunk, group.keys, jnp.float32) * jnp.exp2(middle - total)
    span = jnp.maximum(-middle, middle - last)
    enter = jnp.exp2(first + middle)
    return q.astype(tiling.dtype), k.astype(tiling.dtype), jnp.exp2(last - middle), enter, span


def query_factor(
    total: Float[Array, "c w"], middle: Float[Array, "1 w"], scale: float
) -> Float[Array, "c w"]:
    """Return scale * exp(G - M). A positive scale is part of the exponent and costs nothing."""
    if scale > 0:
        return jnp.exp2(total - (middle - math.log2(scale)))
    return jnp.exp2(total - middle) * scale


def row(x: Float[Array, "c w"], index: int) -> Float[Array, "1 w"]:
    """Return one row of x."""
    return x[index : index + 1]


def check(results: Float[Array, "c w"], index: int) -> Float[Array, "1 w"]:
    """Return zeros, or the largest number in columns in which a row has NaN or infinities.

    The row of the last token depends on all k and v of the chunk and on the incoming state. A maximum that
    ignores NaN shows the largest number.
    """
    return nonfinite.flags(row(results, index)) * jnp.finfo(jnp.float32).max


def largest(spans: list[Float[Array, "1 _"]]) -> Float[Array, ""]:
    """Return the largest number. NaN are ignored or returned, depending on the chip."""
    widest: dict[int, Any] = {}
    for span in spans:
        width = span.shape[1]
        widest[width] = jnp.maximum(widest[width], span) if width in widest else span
    result: Any = None
    for span in widest.values():
        result = jnp.max(span) if result is None else jnp.maximum(result, jnp.max(span))
    return result


def attend(
    tiling: TpuTiling, group: HeadGroup, scores: Float[Array, "c n"], v: Float[Array, "c w"]
) -> Float[Array, "c w"]:
    """Multiply every head's scores by its values, for `heads_together` heads at a time."""
    return attend_to_all(tiling, group, scores, [v])[0]


def attend_to_all(
    tiling: TpuTiling, group: HeadGroup, scores: Float[Array, "c n"], values: Sequence[Float[Array, "c w"]]
) -> list[Float[Array, "c w"]]:
    """Multiply every head's scores by its values in several arrays, which are side by side in a product."""
    together, width = heads_together(tiling, group), tiling.value_width
    parts = []
    for start in range(0, group.heads, together):
        stop = min(start + together, group.heads)
        these = scores[:, start * tiling.chunk : stop * tiling.chunk]
        stacks = [tiles.stack_heads(v[:, start * width : stop * width], stop - start) for v in values]
        parts.append(jnp.split(tiling.dot(these, tiles.side_by_side(stacks)), len(values), axis=1))
    return [tiles.side_by_side(part) for part in zip(*parts, strict=True)]


def heads_together(tiling: TpuTiling, group: HeadGroup) -> int:
    """Return the number of heads whose values fill 128 lanes, or all heads if scores would be misaligned."""
    heads = max(LANES // tiling.value_width, 1)
    return heads if heads * tiling.chunk % LANES == 0 else group.heads


def read_state(
    tiling: TpuTiling, group: HeadGroup, q: Float[Array, "c w"], state: Float[Array, "v w"]
) -> Float[Array, "c vw"]:
    """Multiply every head's queries by its state."""
    return tiling.dot(q, tiles.stack_heads(state, group.heads), "nt")


def block_sums(
    tiling: TpuTiling, g: Float[Array, "c w"], level: Int[Array, ""] | int
) -> tuple[Float[Array, "c w"], Float[Array, "c w"]]:
    """Return the decay from a block's start to every token and from there to its end, in bits.

    Blocks have 2**level tokens.
    """
    to, after = tiles.sum_masks(*tiling.positions(), level)
    return tiling.sums(to, g), tiling.sums(after, g)


def bisected_scores(
    tiling: TpuTiling,
    group: HeadGroup,
    q: Float[Array, "c w"],
    k: Float[Array, "c w"],
    g: Float[Array, "c w"],
) -> Float[Array, "c n"]:
    """Return decayed scores of all pairs, 0 for j > i, without exponents above 0."""
    i, j = tiling.positions(group.heads)
    diagonal = tiling.dot(q, tiles.stack_heads(k, group.heads), "nt")

    def add(level: Int[Array, ""], scores: Float[Array, "c n"]) -> Float[Array, "c n"]:
        from_start, to_end = block_sums(tiling, g, level)
        keys = tiles.stack_heads(k * jnp.exp2(to_end), group.heads)
        cross = tiling.dot(q * jnp.exp2(from_start), keys, "nt")
        return jnp.where(tiles.pair_masks(i, j, level), cross, scores)

    return tiles.loop(tiles.levels(tiling.chunk), add, tiles.keep(i == j, diagonal))


def finish(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    o: Float[Array, "c w"],
    gating: Gating | None,
    lost: Float[Array, "c w"] | None = None,
) -> None:
    """Normalize and gate o if the scan is gated, and store it, with NaN where it is lost."""
    if gating is not None:
        z = refs["out_gate"].load(chunk, group.values, jnp.float32)
        weight = refs["norm_weight"][:, group.values]
        o *= inverse_norm(tiling, group, o, gating) * weight * tiles.silu(z)
    refs["o"].store(chunk, group.values, o if lost is None else nonfinite.mark(lost, o))


def inverse_norm(
    tiling: TpuTiling, group: HeadGroup, o: Float[Array, "c w"], gating: Gating
) -> Float[Array, "c w"]:
    """Return 1 / sqrt(mean(o**2) + eps) of every head, on all its lanes."""
    return jax.lax.rsqrt(head_means(tiling, group, o * o) + gating.eps)


def head_means(tiling: TpuTiling, group: HeadGroup, x: Float[Array, "c w"]) -> Float[Array, "c w"]:
    """Return every head's mean, on all its lanes, by a product with blocks of ones."""
    # A product as wide as the matrix unit, which is twice a chunk.
    width = max(min(max(LANES, 2 * tiling.chunk), x.shape[1]), tiling.value_width)
    shift = tiling.value_width.bit_length() - 1
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (0, 1))
    # 1 / width is exact in bfloat16; 1 / values may not be.
    same = ((i >> shift) == (j >> shift)).astype(jnp.float32) * (1.0 / tiling.value_width)
    parts = [
        tiling.dot(x[:, start : start + width], same[: x.shape[1] - start, : x.shape[1] - start])
        for start in range(0, x.shape[1], width)
    ]
    means = tiles.side_by_side(parts)
    return means if tiling.values == tiling.value_width else means * (tiling.value_width / tiling.values)
