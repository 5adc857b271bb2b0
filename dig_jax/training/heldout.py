"""The mean loss on held-out images."""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dig_jax.components import Components, Params
from dig_jax.data import epoch
from dig_jax.errors import StalledRead
from dig_jax.parallel import process_shard, replicated, to_global
from dig_jax.training.batch_reader import BatchReader
from dig_jax.training.objectives.denoising import Batch, Draw, losses
from dig_jax.training.state import Purpose, purpose_key

_GOLDEN_RATIO = 2654435769  # (√5 - 1)/2 of 2³²


class HeldoutLoss:
    """The held-out loss as a function of the parameters, compiled at the first call."""

    def __init__(self, components: Components, mesh: Mesh):
        self._source, self._mesh = components.heldout_source, mesh
        self._batch_size = components.config.data.batch_size
        self._sums = jax.jit(functools.partial(heldout_sums, components), out_shardings=replicated(mesh))

    def __call__(self, params: Params, should_stop: Callable[[], bool] = lambda: False) -> float | None:
        """Compute the mean over all held-out images; None if there are none.

        Args:
            params: parameters of the model.
            should_stop: whether the process must exit; asked while a read takes long.

        Raises:
            StalledRead: the process must exit and the next batch does not arrive.
        """
        if not len(self._source):
            return None
        shard, sums = process_shard(self._mesh), []
        batches = epoch(
            self._source,
            batch_size=self._batch_size,
            process_index=shard.index,
            process_count=shard.count,
        )
        with contextlib.closing(BatchReader(batches, should_stop)) as reader:
            for number in range(-(-len(self._source) // self._batch_size)):
                batch = reader.read()
                if batch is None:
                    raise StalledRead("stopped while waiting for held-out images")
                # Bound the work in flight, as training does.
                jax.block_until_ready(sums[-1:])
                sums.append(self._sums(params, to_global(batch, self._mesh), number * self._batch_size))
        total, count = map(sum, zip(*sums, strict=True))
        return float(total / count)


def heldout_sums(
    components: Components, params: Params, batch: Batch, first: Int[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of the losses and the number of images of a held-out batch.

    The noise and the time of an image depend only on its index in the held-out split, so that values of
    different steps can be compared. The times are spread evenly, by the Weyl sequence of the golden ratio.

    Args:
        components: model and process.
        params: parameters of the model.
        batch: {"image": [B, h, w, c], "label": [B], "mask": bool [B], False where the batch is padded}.
        first: index of the batch's first image.
    """
    indices = first + jnp.arange(batch["image"].shape[0])
    key = purpose_key(components, Purpose.HELDOUT)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    noise = jax.vmap(lambda key: jax.random.normal(key, batch["image"].shape[1:]))(keys)
    times = components.diffusion.times_at(spread(indices))
    values = losses(components, params, batch, Draw(times, noise))
    return jnp.sum(values * batch["mask"]), jnp.sum(batch["mask"].astype(jnp.float32))


def spread(indices: Int[Array, " b"]) -> Float[Array, " b"]:
    """Return the Weyl sequence of the golden ratio at these indices: evenly spread numbers in [0, 1)."""
    # Integer products wrap around exactly; float32 products of large indices would round to a few values.
    return (indices.astype(jnp.uint32) * jnp.uint32(_GOLDEN_RATIO) >> 8).astype(jnp.float32) * 2**-24
