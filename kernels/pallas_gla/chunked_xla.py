"""Chunked GLA in plain JAX: matrix products on every platform, accurate for every decay <= 0.

Inside a chunk, token i sees token j <= i through the decay exp(g_{j+1} + ... + g_i). The textbook form
exp(G_i - G_j) of cumulative sums G overflows or cancels when decays are strong. Doubling avoids this. Take
two neighboring blocks of b tokens, with i in the second and j in the first:

    g_{j+1} + ... + g_i = (from j + 1 to the end of the first block) + (from the start of the second one to i)

Both terms are sums of numbers <= 0 and nothing is ever subtracted, so both factors exp(...) are accurate and
at most 1, and the scores of all b x b pairs are one matrix product of decayed queries and keys. Blocks of 1,
2, 4, ... tokens cover every pair of the chunk once. The last sums extend to the ends of the chunk, as the
recurrence from chunk to chunk requires. (Yang et al. 2024: chunkwise form, section 4.1; products between
blocks inside a chunk, section 4.3.)

Reverse mode recomputes a chunk from its inputs and its incoming state: `forward` through `jax.checkpoint`,
which also allows forward mode, and `backward` explicitly.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_gla import isolation
from pallas_gla.gating import gated_output, log_decay
from pallas_gla.scan import Operands, Scan, saved_shape
from pallas_gla.scan_order import segment_starts, to_raster_order, to_scan_order, zero_state

# Forward and backward on two CPU cores, float32, K = 32, V = 64, in ms:
#   chunk                  16     32     64
#   B=128 T=64  H=2      22.3   29.7   15.6
#   B=32  T=256 H=6      84.2   89.6    102
# Longer chunks also save fewer states and take fewer sequential steps.
CHUNK_SIZE = 64


class Tokens(NamedTuple):
    """The arrays of tokens of a scan, split into chunks: [N, B, C, H, width] or one chunk of them."""

    q: Float[Array, "*n b c h k"]
    k: Float[Array, "*n b c h k"]
    v: Float[Array, "*n b c h v"]
    g: Float[Array, "*n b c h k"]
    out_gate: Float[Array, "*n b c h v"] | None


def unsupported(operands: Operands, scan: Scan) -> str | None:
    """Return None: plain JAX supports every scan."""
    del operands, scan
    return None


@functools.partial(jax.jit, static_argnames=("scan", "save"))
def forward(
    operands: Operands, scan: Scan, *, save: bool = False
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """Run a scan (see `pallas_gla.dispatch`); differentiable in every mode."""
    state, weight, tokens, starts = _prepare(operands, scan)
    one_chunk = len(tokens.q) == 1
    # In a loop CSE cannot merge the recomputation with the forward pass, so no barriers are needed.
    chunk = jax.checkpoint(functools.partial(run_chunk, scan=scan), prevent_cse=one_chunk)
    if one_chunk:
        final_state, out = chunk(state, weight, *jax.tree.map(lambda x: x[0], (tokens, starts)))
        out, states = out[None], None if state is None else state[None]
    else:
        assert state is not None

        def body(state, arrays):
            new_state, out = chunk(state, weight, *arrays)
            return new_state, (out, state if save else None)

        final_state, (out, states) = jax.lax.scan(body, state, (tokens, starts))
    saved = _pack(states, operands, scan) if save else None
    # XLA for CPUs updates a bfloat16 array in a loop by converting the complete array in every step.
    return _join(out, operands, scan).astype(operands.v.dtype), final_state, saved


def backward(
    operands: Operands,
    states: Float[Array, "b n v hk"],
    d_out: Float[Array, "b t h v"],
    d_final_state: Float[Array, "b h k v"],
    scan: Scan,
) -> Operands:
    """Return the gradients of a scan (see `pallas_gla.dispatch`)."""
    state, weight, tokens, starts = _prepare(operands, scan)
    d_out = _split(d_out, operands, scan)
    d_weight = None if weight is None else jnp.zeros_like(weight, jnp.float32)

    def chunk_gradient(carry, chunk):
        d_state, d_weight = carry
        state, tokens, starts, d_out = chunk
        d_out = d_out.astype(jnp.float32)
        chunk = functools.partial(run_chunk, starts=starts, scan=scan)
        d_state, d_weight_here, d_tokens = jax.vjp(chunk, state, weight, tokens)[1]((d_state, d_out))
        return (d_state, None if weight is None else d_weight + d_weight_here), d_tokens

    if len(tokens.q) == 1:
        only = jax.tree.map(lambda x: x[0], (tokens, starts, d_out))
        (d_state, d_weight), d_tokens = chunk_gradient((d_final_state, d_weight), (state, *only))
        d_tokens = jax.tree.map(lambda x: x[None], d_tokens)
    else:
        chunks = (_unpack(states, operands, scan), tokens, starts, d_out)
        start = (d_final_state, d_weight)
        (d_state, d_weight), d_tokens = jax.lax.scan(chunk_gradient, start, chunks, reverse=True)
    gradients = {name: _join(x, operands, scan) for name, x in d_tokens._asdict().items() if x is not None}
    d_state = None if operands.initial_state is None else d_state
    return Operands(**gradients, norm_weight=d_weight, initial_state=d_state)


def run_chunk(
    state: Float[Array, "b h k v"] | None,
    norm_weight: Float[Array, "b v"] | None,
    tokens: Tokens,
    starts: Bool[Array, "b c"] | None,
    *,
    scan: Scan,
) -> tuple[Float[Array, "b h k v"], Float[Array, "b c h v"]]:
    """Run one chunk; return the outgoing state and the output.

    `starts` marks the starts of segments. A state of None is zero and costs nothing.
    """
    q, k, v, g = (x.swapaxes(1, 2) for x in tokens[:4])
    dtype = v.dtype
    if scan.gating:
        g = log_decay(g, scan.gating)
    q, k, g = (x.astype(jnp.float32) for x in (q, k, g))
    q *= scan.scale
    run = None if starts is None else jnp.cumsum(starts, axis=1, dtype=jnp.int32)[:, None]
    o_trace, state_trace, (q, k, v, g), state = _isolated(q, k, v, g, state, run)
    scores, from_start, to_end = _scores(q, k, g, dtype)
    q *= jnp.exp(from_start)
    k *= jnp.exp(to_end)
    decay = jnp.exp(from_start[:, :, -1])
    if run is not None:
        run = run[..., None]
        last = run[:, :, -1:]
        scores = jnp.where(run == run.swapaxes(2, 3), scores, 0)
        q = jnp.where(run == 0, q, 0)
        k = jnp.where(run == last, k, 0)
        decay = jnp.where(last[:, :, 0] == 0, decay, 0)
    o = _dot("bhij,bhjv->bhiv", scores, v, dtype)
    new_state = _dot("bhjk,bhjv->bhkv", k, v, dtype)
    if state is not None:
        o += _dot("bhik,bhkv->bhiv", q, state, dtype)
        new_state += decay[..., None] * state
    o = isolation.without_gradient(o) + o_trace[..., None]
    new_state = isolation.without_gradient(new_state) + state_trace[..., None, None]
    if scan.gating:
        assert tokens.out_gate is not None and norm_weight is not None
        o = gated_output(o, tokens.out_gate.swapaxes(1, 2), norm_weight[:, None, None], scan.gating)
    return new_state, o.swapaxes(1, 2)


def _isolated(
    q: Float[Array, "b h c k"],
    k: Float[Array, "b h c k"],
    v: Float[Array, "b h c v"],
    g: Float[Array, "b h c k"],
    state: Float[Array, "b h k v"] | None,
    run: Int[Array, "b 1 c"] | None,
) -> tuple[Float[Array, "b h c"], Float[Array, "b h"], tuple, Float[Array, "b h k v"] | None]:
    """Return the NaN of every output and of the outgoing state (`isolation.trace`), and finite operands.

    `run` is the number of segments that started before a token, in this chunk.
    """
    g = jnp.maximum(g, jnp.finfo(g.dtype).min)
    written = isolation.trace(k) + isolation.trace(v) + isolation.trace(g)
    read = jnp.tril(
        jnp.ones((1, 1, q.shape[2], q.shape[2]), bool)
    )  # of equal rank: promotion may be an error
    kept = read[:, :, -1]
    if run is not None:
        read, kept = read & (run[..., None] == run[..., None, :]), run == run[..., -1:]
    before = jnp.sum(jnp.where(read, written[..., None, :], 0), axis=-1)
    after = jnp.sum(jnp.where(kept, written, 0), axis=-1)
    if state is not None:
        entering = jnp.sum(isolation.trace(state), axis=-1)
        before += entering[..., None] if run is None else jnp.where(run == 0, entering[..., None], 0)
        after += entering if run is None else jnp.where(run[..., -1] == 0, entering, 0)
        state = isolation.without(state)
    own = isolation.trace(q)
    # The gradients of q and g depend on what was written before.
    q, g = (x * (1 + before[..., None]) for x in (q, g))
    q, k, v, g = map(isolation.without, (q, k, v, g))
    return before + own, after, (q, k, v, g), state


def _scores(
    q: Float[Array, "b h c k"], k: Float[Array, "b h c k"], g: Float[Array, "b h c k"], dtype: jnp.dtype
) -> tuple[Float[Array, "b h c c"], Float[Array, "b h c k"], Float[Array, "b h c k"]]:
    """Return decayed scores of all pairs j <= i, sums of g from the start to i, and from j + 1 to the end."""
    batch, heads, tokens, width = q.shape
    scores = jnp.sum(q * k, axis=-1)[..., None, None]
    from_start = g[:, :, :, None]
    to_end = jnp.zeros_like(from_start)
    size = 1
    while size < tokens:
        blocks = (batch, heads, tokens // size, size, width)
        (scores_1, scores_2), (start_1, start_2), (end_1, end_2) = map(_pairs, (scores, from_start, to_end))
        queries = _pairs(q.reshape(blocks))[1] * jnp.exp(start_2)
        keys = _pairs(k.reshape(blocks))[0] * jnp.exp(end_1)
        cross = _dot("bhnik,bhnjk->bhnij", queries, keys, dtype)
        first = jnp.concatenate([scores_1, jnp.zeros_like(cross)], axis=-1)
        second = jnp.concatenate([cross, scores_2], axis=-1)
        scores = jnp.concatenate([first, second], axis=-2)
        from_start = jnp.concatenate([start_1, start_2 + start_1[..., -1:, :]], axis=-2)
        to_end = jnp.concatenate([end_1 + start_2[..., -1:, :], end_2], axis=-2)
        size *= 2
    return scores[:, :, 0], from_start[:, :, 0], to_end[:, :, 0]


def _pairs(x: Float[Array, "b h n c w"]) -> tuple[Float[Array, "b h m c w"], Float[Array, "b h m c w"]]:
    """Return the first and the second of every two neighboring blocks."""
    return x[:, :, ::2], x[:, :, 1::2]


def _dot(
    equation: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Multiply operands in `dtype`, accumulating in float32."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    if dtype == jnp.float16:
        # Decayed keys, states and scores may leave the range of float16 where the output does not.
        dtype = jnp.float32
    return jnp.einsum(
        equation, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )


def _prepare(
    operands: Operands, scan: Scan
) -> tuple[
    Float[Array, "b h k v"] | None,
    Float[Array, "b v"] | None,
    Tokens,
    Bool[Array, "n b c"] | None,
]:
    """Return first state, norm_weight, tokens and segment starts, in chunks in scan order."""
    q, k, v, g, out_gate, norm_weight, state, segment_ids = operands
    # Padding tokens have a decay of 1, which keeps the state: sigmoid(1e4) is exactly 1.
    no_decay = 1e4 if scan.gating else 0
    tokens = Tokens(
        q=_split(q, operands, scan),
        k=_split(k, operands, scan),
        v=_split(v, operands, scan),
        g=_split(g, operands, scan, padding=no_decay),
        out_gate=None if out_gate is None else _split(out_gate, operands, scan),
    )
    starts = None
    if segment_ids is not None:
        starts = segment_starts(to_scan_order(segment_ids, scan.grid, scan.direction))
        starts = _split_scanned(starts, _chunk_size(operands, scan), False)
    if len(tokens.q) > 1:
        zeros = zero_state(k, v, g)
        state = zeros if state is None else zeros + state
    return state, norm_weight, tokens, starts


def _chunk_size(operands: Operands, scan: Scan) -> int:
    return min(scan.chunk_size or CHUNK_SIZE, 1 << (operands.q.shape[1] - 1).bit_length())


def _split(
    x: Shaped[Array, "b t *rest"], operands: Operands, scan: Scan, padding: float | int = 0
) -> Shaped[Array, "n b c *rest"]:
    """Split tokens in raster order into chunks in scan order."""
    return _split_scanned(to_scan_order(x, scan.grid, scan.direction), _chunk_size(operands, scan), padding)


def _split_scanned(
    x: Shaped[Array, "b t *rest"], size: int, padding: float | int
) -> Shaped[Array, "n b c *rest"]:
    missing = -x.shape[1] % size
    if missing:
        widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=padding)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _join(chunks: Shaped[Array, "n b c *rest"], operands: Operands, scan: Scan) -> Shaped[Array, "b t *rest"]:
    """Join chunks; the inverse of `_split`."""
    x = chunks.swapaxes(0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, : operands.q.shape[1]]
    return to_raster_order(x, scan.grid, scan.direction)


def _pack(
    states: Float[Array, "n b h k v"] | None, operands: Operands, scan: Scan
) -> Float[Array, "b m v hk"]:
    """Convert states to the layout of `saved_shape`."""
    shape, dtype = saved_shape(operands, scan)
    if states is None:
        return jnp.zeros(shape, dtype)
    packed = jnp.einsum("nbhkv->bnvhk", states).reshape(shape[0], -1, *shape[2:]).astype(dtype)
    return jnp.pad(packed, [(0, 0), (0, shape[1] - packed.shape[1]), (0, 0), (0, 0)])


def _unpack(states: Float[Array, "b m v hk"], operands: Operands, scan: Scan) -> Float[Array, "n b h k v"]:
    """Convert saved states back; the inverse of `_pack`."""
    _, tokens, heads, width = operands.k.shape
    chunks = -(-tokens // _chunk_size(operands, scan))
    states = states[:, :chunks].astype(jnp.float32)
    return jnp.einsum("bnvhk->nbhkv", states.reshape(*states.shape[:3], heads, width))
