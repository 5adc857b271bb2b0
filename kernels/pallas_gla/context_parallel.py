"""Context parallelism: one scan over a sequence whose tokens are sharded over a mesh axis.

A shard maps its incoming state to S_out = diag(exp(sum of g)) S_in + S_local. Every shard first runs the
scan to get S_local. All shards then gather these states and decay factors (K * V + K numbers per head,
for any length), fold the ones of preceding shards, and run the scan again from the resulting state.
Running a kernel twice moves fewer bytes than running it once and summing decayed k v^T in XLA, which writes
the decayed keys in float32. (LASP-2, Sun et al. 2025, gathers states in the same way, without a decay.)

If the rows of a grid are sharded, every column passes through all shards. One all-to-all gives each shard
full columns instead of full rows, and another one returns the output; in between, a column scan is sharded
like a row scan. This moves every token once: 2K + 2V + K numbers per head, output included. The alternative,
one summary per column and shard, moves K * V + K numbers per column and head to every shard. This is as much
at about 10 rows per shard, and needs more code.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_gla.gating import log_decay
from pallas_gla.scan import Operands, Scan
from pallas_gla.scan_order import segment_starts, to_scan_order, zero_state


def forward(
    run: Callable[[Operands, Scan], tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]],
    operands: Operands,
    scan: Scan,
    axis_name: str,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Run one scan over the tokens of all shards.

    Args:
        run: runs a scan over the tokens of one shard.
        operands: this shard's tokens, ordered by axis index, and the initial state of the full sequence,
            which must be the same on every shard.
        scan: its `grid` describes this shard: some full rows or, if the full grid has one row, some of its
            tokens.
        axis_name: mesh axis of the enclosing `jax.shard_map`.

    Returns:
        This shard's output, and the final state of the full sequence, the same on every shard.
    """
    if not scan.by_columns:
        return _along_shards(run, operands, scan, axis_name)
    shards, (rows, columns) = jax.lax.axis_size(axis_name), scan.grid
    q, k, v, g, out_gate, _, _, segment_ids = operands

    def to_columns(x: Shaped[Array, "b t *rest"]) -> Shaped[Array, "b t *rest"]:
        return _exchange(x, scan.grid, axis_name, split=2, join=1)

    by_columns = operands._replace(
        q=to_columns(q),
        k=to_columns(k),
        v=to_columns(v),
        g=to_columns(g),
        out_gate=None if out_gate is None else to_columns(out_gate),
        segment_ids=None if segment_ids is None else to_columns(segment_ids),
    )
    grid = (rows * shards, columns // shards)
    out, final_state = _along_shards(run, by_columns, dataclasses.replace(scan, grid=grid), axis_name)
    return _exchange(out, grid, axis_name, split=1, join=2), final_state


def _exchange(
    x: Shaped[Array, "b t *rest"], grid: tuple[int, int], axis_name: str, *, split: int, join: int
) -> Shaped[Array, "b t *rest"]:
    """Shard grid axis `split` and gather grid axis `join`, which was sharded before."""
    x = x.reshape(x.shape[0], *grid, *x.shape[2:])
    x = jax.lax.all_to_all(x, axis_name, split_axis=split, concat_axis=join, tiled=True)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _along_shards(
    run: Callable, operands: Operands, scan: Scan, axis_name: str
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Run a scan in which each shard continues the previous one or, in reverse, the next one."""
    index, last = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name) - 1
    position = last - index if scan.reverse else index
    _, k, v, g, *_ = operands
    if scan.gating:
        g = log_decay(g, scan.gating)
    factor = jnp.exp(jnp.sum(g.astype(jnp.float32), axis=1))
    cut = None
    if operands.segment_ids is not None:
        ids = to_scan_order(operands.segment_ids, scan.grid, scan.direction)
        cut = _differs_from_previous(ids, position, axis_name, scan.reverse)
        factor = jnp.where((cut | segment_starts(ids).any(axis=1))[:, None, None], 0, factor)
    _, local_state = run(operands._replace(initial_state=None), scan)

    def fold(incoming, shard):
        state, factor = shard
        return factor[..., None] * incoming + state, incoming

    start = zero_state(k, v, g)
    if operands.initial_state is not None:
        start += operands.initial_state
    summaries = jax.lax.all_gather((local_state, factor), axis_name)
    _, incoming = jax.lax.scan(fold, start, summaries, reverse=scan.reverse)
    incoming = jax.lax.dynamic_index_in_dim(incoming, index, keepdims=False)
    if cut is not None:
        incoming = jnp.where(cut[:, None, None, None], 0, incoming)
    out, final_state = run(operands._replace(initial_state=incoming), scan)
    return out, jax.lax.psum(jnp.where(position == last, final_state, 0), axis_name)


def _differs_from_previous(
    ids: Int[Array, "b t"], position: Int[Array, ""], axis_name: str, reverse: bool
) -> Bool[Array, " b"]:
    """Return whether this shard's first id, in scan order, differs from the preceding shard's last id."""
    size = jax.lax.axis_size(axis_name)
    step = -1 if reverse else 1
    neighbors = [(i, i + step) for i in range(size) if 0 <= i + step < size]
    previous = jax.lax.ppermute(ids[:, -1], axis_name, neighbors)
    return (position > 0) & (ids[:, 0] != previous)
