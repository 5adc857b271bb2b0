"""A stack of blocks stored and run in groups, so that the program's size does not grow with its depth.

Layout of the parameters (and so of checkpoints): block i is layer i // period of `groups[i % period]`,
whose leaves have a leading axis of depth // period. DiG's period is 4, one block per scan direction, also
with fewer directions; DiT's is 1. The depth % period blocks that are left over stand unstacked in `rest`.
With long skips, `skips` holds the joining linears stacked in the order of the blocks that they precede,
depth/2 + 1 … depth - 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.models.blocks import Block
from dig_jax.models.layers import Linear, xavier
from dig_jax.parallel import axis_sizes, gather_params, save_all_but_gathered

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class BlockStack(nnx.Module):
    """`depth` blocks, optionally with long skips (Bao et al. 2023) from the first half to the second.

    Args:
        make_block: (index modulo period, rngs) → Block.
        skip: None, "linear" (random start) or "identity" (starts as if there were no skip).
        transposed_skips: whether skips from even blocks arrive with rows and columns exchanged, as they
            do upstream.
        remat: None keeps all activations for the backward pass; "full" keeps only each group's input;
            "dots" the results of the matrix products too.
    """

    def __init__(
        self,
        make_block: Callable[[int, nnx.Rngs], Block],
        *,
        width: int,
        depth: int,
        period: int,
        skip: str | None = None,
        transposed_skips: bool = False,
        remat: str | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.depth, self.period, self.remat, self.dtype = depth, period, remat, dtype
        self.transposed_skips = transposed_skips
        num_groups, num_rest = divmod(depth, period)

        def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int) -> nnx.Module:
            return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))

        self.groups = nnx.List(
            [
                stacked(lambda rngs, position=position: make_block(position, rngs), num_groups)
                for position in range(period if num_groups else 0)
            ]
        )
        self.rest = nnx.List([make_block(position, rngs) for position in range(num_rest)])

        def make_skip(rngs: nnx.Rngs) -> Linear:
            return _skip_linear(width, identity=skip == "identity", dtype=dtype, rngs=rngs)

        self.skips = None if skip is None else stacked(make_skip, depth // 2 - 1)

    def __call__(
        self, x: Float[Array, "b t d"], c: Float[Array, "b d"], grid: tuple[int, int]
    ) -> Float[Array, "b t d"]:
        """Runs all blocks."""
        if self.skips is not None:
            return self._with_skips(x, c, grid)
        if self.groups:
            run, params = self._group_runner(c, grid)
            x, _ = jax.lax.scan(self._rematerialised(lambda x, layer: (run(x, layer)[0], None)), x, params)
        for block in self.rest:
            x = self._rematerialised(lambda x, block=block: self._ready(*nnx.split(block))(x, c, grid))(x)
        return x

    def _rematerialised(self, function: Callable) -> Callable:
        if self.remat is None and not axis_sizes().keys() & {"fsdp", "tensor"}:
            return function
        policy = REMAT_POLICIES[self.remat] if self.remat else save_all_but_gathered
        # Inside scan the compiler cannot undo the recomputation, so the barriers against it are not needed.
        return jax.checkpoint(function, policy=policy, prevent_cse=False)

    def _ready(self, graphdef: nnx.GraphDef, params: Any) -> nnx.Module:
        """A module whose parameters lie as it computes with them."""
        return nnx.merge(graphdef, gather_params(nnx.to_pure_dict(params), self.dtype))

    def _group_runner(self, c: Array, grid: tuple[int, int]) -> tuple[Callable, list]:
        """A function of (x, one layer of every stack) and the stacks' parameters, to scan over."""
        graphdefs, params = zip(*map(nnx.split, self.groups), strict=True)

        def run(x: Array, layer: list, join: Callable | None = None) -> tuple[Array, list[Array]]:
            outputs = []
            for position, (graphdef, block) in enumerate(zip(graphdefs, layer, strict=True)):
                x = x if join is None else join(x, position)
                x = self._ready(graphdef, block)(x, c, grid)
                outputs.append(x)
            return x, outputs

        return run, list(params)

    def _with_skips(self, x: Array, c: Array, grid: tuple[int, int]) -> Array:
        """Scans the groups that lie wholly in the first or the second half; the middle is unrolled.

        Block `target` takes the output of block depth - 1 - target. Whole groups face whole groups only
        where the depth is a multiple of the period; otherwise all blocks are unrolled.
        """
        period, half = self.period, self.depth // 2
        outer = 0 if self.rest else (half - 1) // period
        first, last = outer * period, self.depth - outer * period
        skip_graphdef, skip_params = nnx.split(self.skips)
        run, params = self._group_runner(c, grid) if self.groups else (None, [])

        def at(tree, index):
            return jax.tree.map(lambda leaf: leaf[index], tree)

        def join(x: Array, skip: Array, source: int, params) -> Array:
            if self.transposed_skips and source % 2 == 0:
                skip = skip.reshape(skip.shape[0], *grid, -1).swapaxes(1, 2).reshape(skip.shape)
            return self._ready(skip_graphdef, params)(jnp.concatenate([x, skip], axis=-1))

        def unrolled_block(x: Array, index: int) -> Array:
            if index >= self.depth - len(self.rest):
                return self._ready(*nnx.split(self.rest[index % period]))(x, c, grid)
            graphdef, params = nnx.split(self.groups[index % period])
            return self._ready(graphdef, at(params, index // period))(x, c, grid)

        def late_group(x: Array, inputs: tuple) -> tuple[Array, None]:
            layer, skips, skip_params = inputs

            def join_at(x: Array, position: int) -> Array:
                source = period - 1 - position  # counted inside the source's group
                return join(x, skips[source], source, at(skip_params, position))

            return run(x, layer, join_at)[0], None

        if outer:
            early = at(params, slice(outer))
            x, outputs = jax.lax.scan(self._rematerialised(run), x, early)
        stored = []
        for index in range(first, last):
            if index > half:
                x = join(x, stored.pop(), self.depth - 1 - index, at(skip_params, index - half - 1))
            x = self._rematerialised(lambda x, index=index: unrolled_block(x, index))(x)
            if index < half - 1:
                stored.append(x)
        if outer:
            late_skips = jax.tree.map(
                lambda leaf: leaf[-first:].reshape(outer, period, *leaf.shape[1:]), skip_params
            )
            outputs = [output[::-1] for output in outputs]
            x, _ = jax.lax.scan(
                self._rematerialised(late_group), x, (at(params, slice(-outer, None)), outputs, late_skips)
            )
        return x


def _skip_linear(width: int, *, identity: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    def identity_then_zero(key: Array, shape: tuple[int, ...], dtype: DTypeLike, **_) -> Array:
        return jnp.eye(*shape, dtype=dtype)

    kernel_init = identity_then_zero if identity else xavier
    return Linear(2 * width, width, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
