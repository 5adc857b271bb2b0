"""The TPU kernel's forward pass over the chunks of one grid step.

With G the sum of decays after the chunk's first token, M its value in the middle and L at the end, S the
(transposed) state that enters, g_0 the decay of the first token, and tokens i >= j along the scan:

    q~ = scale q exp(G - M),   k~ = k exp(M - G),   S~ = S exp(g_0 + M)
    o = mask(q~ k~^T) v + q~ S~^T,   S <- exp(L - M) (S~ + v^T k~)

so that a token needs two exponentials and the rest is matrix products (Yang et al. 2024, section 4.2, with
the reference in the middle, which halves the range of the exponents, and without g_0, which no pair of tokens
of the chunk meets and which may be a reset). A step whose decays span more than `MAX_SPAN` is run again by
bisection: pairs (i, j) are met in neighbouring blocks of 1, 2, 4, ... tokens, whose decay is a sum from j to
the end of its block and one from the start of i's, both <= 0.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_gla.mosaic_tpu import tiles
from pallas_gla.mosaic_tpu.tiles import HeadGroup, TpuTiling
from pallas_gla.mosaic_tpu.tokens import LANES
from pallas_gla.scan import Gating

# A decay of so many bits is zero in float32.
NO_STATE = -512.0


def forward_kernel(refs: dict[str, Any], tiling: TpuTiling, scale: float, gating: Gating | None) -> None:
    """Runs one grid step, (batch, heads, chunks); `refs` are named as in `mosaic_launch`."""
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
        q, k, leave, enter, span = factorised(refs, tiling, chunk, group, first, total, scale)
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
    """The step for any decay; overwrites what the factorised form has written."""
    state_ref = refs["state"]
    state_ref[after] = state_ref[before]

    def run(chunk: Int[Array, ""]) -> None:
        for group in tiling.groups:
            g = any_decay(refs, tiling, chunk, group, gating)
            q = refs["q"].load(chunk, group.keys, jnp.float32) * scale
            k = refs["k"].load(chunk, group.keys, jnp.float32)
            v = refs["v"].load(chunk, group.values)
            state = state_ref[after, :, group.keys]
            if "states" in refs:
                refs["states"][chunk, :, group.keys] = state.astype(refs["states"].dtype)
            from_start, to_end = block_sums(tiling, g, tiles.levels(tiling.chunk))
            scores = bisected_scores(tiling, group, q, k, g)
            o = attend(tiling, group, scores, v)
            o += read_state(tiling, group, q * jnp.exp2(from_start), state)
            finish(refs, tiling, chunk, group, o, gating)
            update = tiles.fold_heads(tiling.dot(v, k * jnp.exp2(to_end), "tn"), group.heads)
            decayed = state * jnp.exp2(row(from_start, tiling.scan_rows[2]))
            state_ref[after, :, group.keys] = decayed + update

    tiles.for_chunks(tiling, run)


def decay(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    gating: Gating | None,
) -> Float[Array, "c w"]:
    """The chunk's decays in units of `unit`."""
    if gating is None:
        return refs["g"].load(chunk, group.keys)
    # One rounding to bfloat16 changes exp(-x) by at most 0.1 %, and halves the products of its sums.
    return tiles.softplus_bits(-refs["g"].load(chunk, group.keys, jnp.float32)).astype(tiling.dtype)


def any_decay(
    refs: dict[str, Any], tiling: TpuTiling, chunk: Int[Array, ""], group: HeadGroup, gating: Gating | None
) -> Float[Array, "c w"]:
    """The chunk's decays in bits, `NO_STATE` at least, so that their sums are finite."""
    g = decay(refs, tiling, chunk, group, gating).astype(jnp.float32) * unit(gating)
    return jnp.maximum(g, NO_STATE)


def unit(gating: Gating | None) -> float:
    """What turns `decay` into bits."""
    return tiles.BITS if gating is None else -1.0 / gating.normalizer


def decay_sums(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int,
    group: HeadGroup,
    sum_to: Bool[Array, "c c"],
    gating: Gating | None,
) -> tuple[Float[Array, "1 w"], Float[Array, "c w"]]:
    """Bits of decay of the chunk's first token, and from there to every token."""
    g = decay(refs, tiling, chunk, group, gating)
    first = row(g, tiling.scan_rows[0]).astype(jnp.float32) * unit(gating)
    return first, tiling.sums(sum_to, g, unit(gating))


def to_token(tiling: TpuTiling) -> Bool[Array, "c c"]:
    """Of the tokens after a chunk's first, those up to that of the row."""
    i, j = tiling.positions()
    return (j <= i) & (j > 0)


def factorised(
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
    """q~ and k~ in the dtype of products, exp(L - M), exp(g_0 + M), and the decay from M to an end."""
    middle, last = (row(total, r) for r in tiling.scan_rows[1:])
    q = refs["q"].load(chunk, group.keys, jnp.float32) * query_factor(total, middle, scale)
    k = refs["k"].load(chunk, group.keys, jnp.float32) * jnp.exp2(middle - total)
    span = jnp.maximum(-middle, middle - last)
    enter = jnp.exp2(first + middle)
    return q.astype(tiling.dtype), k.astype(tiling.dtype), jnp.exp2(last - middle), enter, span


def query_factor(
    total: Float[Array, "c w"], middle: Float[Array, "1 w"], scale: float
) -> Float[Array, "c w"]:
    """scale exp(G - M); a positive scale costs nothing in the exponent."""
    if scale > 0:
        return jnp.exp2(total - (middle - math.log2(scale)))
    return jnp.exp2(total - middle) * scale


def row(x: Float[Array, "c w"], index: int) -> Float[Array, "1 w"]:
    """One row of x."""
    return x[index : index + 1]


def largest(spans: list[Float[Array, "1 _"]]) -> Float[Array, ""]:
    """The largest of all numbers; NaN if one is."""
    widest = {}
    for span in spans:
        width = span.shape[1]
        widest[width] = jnp.maximum(widest[width], span) if width in widest else span
    result = None
    for span in widest.values():
        result = jnp.max(span) if result is None else jnp.maximum(result, jnp.max(span))
    return result


def attend(
    tiling: TpuTiling, group: HeadGroup, scores: Float[Array, "c n"], v: Float[Array, "c w"]
) -> Float[Array, "c w"]:
    """Every head's scores times its values. Heads that fill the lanes together are kept to themselves."""
    together = heads_together(tiling, group)
    parts = []
    for start in range(0, group.heads, together):
        heads = min(together, group.heads - start)
        these = scores[:, start * tiling.chunk : (start + heads) * tiling.chunk]
        values = v[:, start * tiling.value_width : (start + heads) * tiling.value_width]
        parts.append(tiling.dot(these, tiles.stack_heads(values, heads)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def heads_together(tiling: TpuTiling, group: HeadGroup) -> int:
    """Heads whose values fill 128 lanes, if their scores begin at a multiple of 128 lanes too."""
    heads = max(LANES // tiling.value_width, 1)
    return heads if heads * tiling.chunk % LANES == 0 else group.heads


def read_state(
    tiling: TpuTiling, group: HeadGroup, q: Float[Array, "c w"], state: Float[Array, "v w"]
) -> Float[Array, "c vw"]:
    """Every head's queries times its state."""
    return tiling.dot(q, tiles.stack_heads(state.astype(tiling.dtype), group.heads), "nt")


def block_sums(
    tiling: TpuTiling, g: Float[Array, "c w"], level: Int[Array, ""] | int
) -> tuple[Float[Array, "c w"], Float[Array, "c w"]]:
    """Bits of decay in blocks of 2**level tokens: from the start to every token, and after it to the end."""
    to, after = tiles.sum_masks(*tiling.positions(), level)
    return tiling.sums(to, g), tiling.sums(after, g)


def bisected_scores(
    tiling: TpuTiling,
    group: HeadGroup,
    q: Float[Array, "c w"],
    k: Float[Array, "c w"],
    g: Float[Array, "c w"],
) -> Float[Array, "c n"]:
    """Decayed scores of all pairs, 0 for j > i, without an exponent above 0."""
    i, j = tiling.positions(group.heads)
    diagonal = tiling.dot(q, tiles.stack_heads(k, group.heads), "nt")

    def add(level: Int[Array, ""], scores: Float[Array, "c n"]) -> Float[Array, "c n"]:
        from_start, to_end = block_sums(tiling, g, level)
        keys = tiles.stack_heads(k * jnp.exp2(to_end), group.heads)
        cross = tiling.dot(q * jnp.exp2(from_start), keys, "nt")
        return jnp.where(tiles.pair_masks(i, j, level), cross, scores)

    return jax.lax.fori_loop(0, tiles.levels(tiling.chunk), add, tiles.keep(i == j, diagonal))


def finish(
    refs: dict[str, Any],
    tiling: TpuTiling,
    chunk: int | Int[Array, ""],
    group: HeadGroup,
    o: Float[Array, "c w"],
    gating: Gating | None,
) -> None:
    """Normalises and gates o where that is asked for, and writes it."""
    if gating is not None:
        z = refs["out_gate"].load(chunk, group.values, jnp.float32)
        weight = refs["norm_weight"][:, group.values]
        o *= inverse_norm(tiling, group, o, gating) * weight * tiles.silu(z)
    refs["o"].store(chunk, group.values, o)


def inverse_norm(
    tiling: TpuTiling, group: HeadGroup, o: Float[Array, "c w"], gating: Gating
) -> Float[Array, "c w"]:
    """1 / sqrt(mean of squares + eps) of every head, on all its lanes."""
    return jax.lax.rsqrt(head_means(tiling, group, o * o) + gating.eps)


def head_means(tiling: TpuTiling, group: HeadGroup, x: Float[Array, "c w"]) -> Float[Array, "c w"]:
    """The mean of every head's lanes, on all of them, as a product with blocks of ones."""
    width = max(min(LANES, x.shape[1]), tiling.value_width)
    shift = tiling.value_width.bit_length() - 1
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (0, 1))
    # 1 / width is exact in bfloat16, 1 / values need not be.
    same = ((i >> shift) == (j >> shift)).astype(jnp.float32) * (1.0 / tiling.value_width)
    parts = [
        tiling.dot(x[:, start : start + width], same[: x.shape[1] - start, : x.shape[1] - start])
        for start in range(0, x.shape[1], width)
    ]
    means = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return means if tiling.values == tiling.value_width else means * (tiling.value_width / tiling.values)
