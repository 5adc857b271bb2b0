"""The mean loss on the images that training never sees."""

import functools

import jax
from jax.sharding import Mesh

from dig_jax.components import Components, Params
from dig_jax.data import epoch
from dig_jax.parallel import process_shard, replicated, to_global
from dig_jax.training import step as steps


class HeldoutLoss:
    """A function of the parameters, compiled when it is first called."""

    def __init__(self, components: Components, mesh: Mesh):
        self._source, self._mesh = components.heldout_source, mesh
        self._batch_size = components.config.data.batch_size
        self._sums = jax.jit(
            functools.partial(steps.heldout_loss, components), out_shardings=replicated(mesh)
        )

    def __call__(self, params: Params) -> float | None:
        """The mean over all held-out images, waiting for it; None where there are none."""
        if not len(self._source):
            return None
        share, sums = process_shard(self._mesh), []
        batches = epoch(
            self._source,
            batch_size=self._batch_size,
            process_index=share.index,
            process_count=share.count,
        )
        for number, batch in enumerate(batches):
            jax.block_until_ready(sums[-1:])
            sums.append(self._sums(params, to_global(batch, self._mesh), number * self._batch_size))
        total, count = map(sum, zip(*sums, strict=True))
        return float(total / count)
