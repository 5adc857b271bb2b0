"""One scan over a sequence whose tokens are split over the devices of a mesh axis.

A shard turns the state that enters it into S_out = diag(exp(sum of g)) S_in + S_local. Each one runs the
scan for its S_local; all gather these and the factors (K * V + K numbers per head, whatever the length), fold
those of the shards before them, and run the scan again from the state that they then know. Two runs of a
kernel move fewer bytes than one, and a sum of decayed k v^T in XLA, which writes the decayed keys in float32.
(The all-gather of states is that of LASP-2, Sun et al. 2025; here with a decay.)

A column of a grid whose rows are split passes through every shard. One all-to-all gives each shard whole
columns in place of whole rows, and another one gives the output back; in between, a column scan is split like
a row scan. That moves every token once, (2K + 2V + K) numbers per head with the output. The alternative, a
summary for each column of each shard, would move K * V + K numbers per column and head to every shard: as
much from about 10 rows a shard on, for more code.
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
    """Runs a scan over this shard's tokens as a part of the whole sequence.

    Args:
        run: the scan over the tokens of one shard.
        operands: this shard's part, in the order of the axis index; the initial state is that of the whole
            sequence, the same on every shard.
        scan: `grid` is this shard's part: whole rows, or in a grid of one row a part of it. A row scan over
            parts of a row is meant for sequences, with one row in all.
        axis_name: mesh axis of the enclosing `jax.shard_map`.

    Returns:
        This shard's o and the final state of the whole sequence, the same on every shard.
    """
    if not scan.by_columns:
        return _along_shards(run, operands, scan, axis_name)
    shards, (rows, columns) = jax.lax.axis_size(axis_name), scan.grid
    q, k, v, g, out_gate, norm_weight, initial_state, segment_ids = operands

    def to_columns(x: Shaped[Array, "b t *rest"] | None) -> Shaped[Array, "b t *rest"] | None:
        return None if x is None else _exchange(x, scan.grid, axis_name, split=2, join=1)

    turned = Operands(
        *map(to_columns, (q, k, v, g, out_gate)), norm_weight, initial_state, to_columns(segment_ids)
    )
    grid = (rows * shards, columns // shards)
    out, final_state = _along_shards(run, turned, dataclasses.replace(scan, grid=grid), axis_name)
    return _exchange(out, grid, axis_name, split=1, join=2), final_state


def _exchange(
    x: Shaped[Array, "b t *rest"], grid: tuple[int, int], axis_name: str, *, split: int, join: int
) -> Shaped[Array, "b t *rest"]:
    """Splits one axis of the grid over the shards, joins the other one, which was split."""
    x = x.reshape(x.shape[0], *grid, *x.shape[2:])
    x = jax.lax.all_to_all(x, axis_name, split_axis=split, concat_axis=join, tiled=True)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _along_shards(
    run: Callable, operands: Operands, scan: Scan, axis_name: str
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """The scan where each shard's tokens follow those of the shard before, or in reverse."""
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
    """Whether this shard's first id, in scan order, differs from the last one of the shard before it."""
    size = jax.lax.axis_size(axis_name)
    step = -1 if reverse else 1
    neighbours = [(i, i + step) for i in range(size) if 0 <= i + step < size]
    previous = jax.lax.ppermute(ids[:, -1], axis_name, neighbours)
    return (position > 0) & (ids[:, 0] != previous)
