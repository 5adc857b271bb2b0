"""A stack of blocks, stored and scanned in groups so that the program size does not grow with the depth.

Layout of the parameters, and so of checkpoints: a pattern of `period` blocks repeats. Block i is layer
i // period of `groups[i % period]`, whose leaves have a leading axis of depth // period. `rest` holds the
last depth % period blocks without that axis. With long skips, `skips` holds the joining linear maps of
blocks depth/2 + 1 … depth - 1, stacked in this order.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.models.blocks import Block, BlockSpec, Features
from dig_jax.models.layers import Linear, xavier
from dig_jax.models.packing import Grid, PackedGrids
from dig_jax.models.rematerialization import Remat, rematerialized, rematerialized_block
from dig_jax.parallel import gather_params
from dig_jax.rngs import make_rngs

SkipKind = Literal["linear", "identity"]

StackFeatures = list[list[Features]]
"""The features of each piece that runs, block by block; stacked over the iterations of a scan."""


class StackOutputs(NamedTuple):
    """What a stack computes.

    Attributes:
        output: tokens after the last block.
        hidden: tokens after each tapped block, by its index.
        features: outputs of mixers and MLPs, if they are kept.
    """

    output: Float[Array, "b t d"]
    hidden: dict[int, Float[Array, "b t d"]]
    features: StackFeatures


@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """Static description of a stack of any depth.

    Args:
        blocks: one period of blocks, repeated to the depth of the stack.
        skip: long skips (Bao et al. 2023) from the first half to the second: None, "linear" (random
            initialization) or "identity" (initialized to ignore the skip).
        transposed_skips: the outputs of even blocks join with rows and columns exchanged, as in the released
            code; needs square grids.
    """

    blocks: tuple[BlockSpec, ...]
    skip: SkipKind | None = None
    transposed_skips: bool = False


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive blocks of a stack that run as one program.

    Args:
        start: index of the first block.
        size: number of blocks in the program.
        repeats: number of iterations of `lax.scan` over the program; None runs it once without a scan.
        skip: "store": each block also returns its output for a long skip; "join": each block first joins one.
    """

    start: int
    size: int
    repeats: int | None = None
    skip: Literal["store", "join"] | None = None

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the segment runs."""
        return self.size * (1 if self.repeats is None else self.repeats)

    def after(self, blocks: Collection[int]) -> Iterator["Segment"]:
        """Cut the segment after each of these blocks; whole periods between cuts stay scanned."""
        start, end = self.start, self.start + self.num_blocks
        for cut in [*sorted(block + 1 for block in blocks if start <= block < end - 1), end]:
            while start < cut:
                repeats = (cut - start) // self.size
                if self.repeats is None or repeats == 0 or (start - self.start) % self.size:
                    # Up to the next period that can be scanned.
                    last = (
                        cut if self.repeats is None else start - (start - self.start) % self.size + self.size
                    )
                    piece = Segment(start, min(cut, last) - start, None, self.skip)
                else:
                    piece = Segment(start, self.size, repeats, self.skip)
                yield piece
                start += piece.num_blocks

    def part(self, piece: "Segment", values: list[Any]) -> list[Any]:
        """Return the share of a piece in one tree per block, whose leaves are stacked if this is scanned."""
        if piece == self:
            return values
        repeat, first = divmod(piece.start - self.start, self.size)
        values = values[first : first + piece.size]
        return values if self.repeats is None else _layers_of(values, repeat, piece.repeats)


def plan_segments(depth: int, period: int, *, long_skips: bool) -> tuple[Segment, ...]:
    """Divide a stack into segments.

    With long skips, block depth - 1 - i joins the output of block i for i < depth/2 - 1. The segments are
    symmetric about the middle, so that each joining segment takes the outputs of one storing segment.

    Raises:
        ValueError: long skips with an odd depth or a depth below 4.
    """
    if not long_skips:
        parts = [(period, depth // period, None), (depth % period, None, None)]
    elif depth < 4 or depth % 2:
        raise ValueError(f"invalid depth={depth} with long skips; expected an even depth of at least 4")
    else:
        joins = depth // 2 - 1
        repeats = max(joins - depth % period, 0) // period  # the last depth % period blocks are not stacked
        single = joins - repeats * period
        parts = [
            (single, None, "store"),
            (period, repeats, "store"),
            (2, None, None),
            (period, repeats, "join"),
            (single, None, "join"),
        ]
    segments, start = [], 0
    for size, repeats, skip in parts:
        segment = Segment(start, size, repeats, skip)
        if segment.num_blocks:
            segments.append(segment)
            start += segment.num_blocks
    return tuple(segments)


class BlockStack(nnx.Module):
    """`depth` blocks that follow a pattern.

    Args:
        remat: what the backward pass recomputes. None: nothing. "full": everything but the input of each
            group of blocks. "dots": everything but these inputs and the results of matrix products. "block":
            everything but the input of each block, one block after the other.
        scan_layers: run repeated blocks as a loop. False repeats them in the program, so that what a block
            saves for the backward pass is not copied into stacked arrays.
    """

    def __init__(
        self,
        pattern: BlockPattern,
        *,
        width: int,
        depth: int,
        remat: Remat | None = None,
        scan_layers: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.scan_layers = scan_layers
        self.depth, self.period, self.dtype = depth, len(pattern.blocks), dtype
        self.remat: Remat | None = remat
        self.transposed_skips = pattern.transposed_skips
        self.segments = plan_segments(depth, self.period, long_skips=pattern.skip is not None)
        num_groups, num_rest = divmod(depth, self.period)

        def make_block(position: int, rngs: nnx.Rngs) -> Block:
            return Block(pattern.blocks[position], width, dtype=dtype, rngs=rngs)

        def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int) -> nnx.Module:
            return nnx.vmap(lambda key: make(make_rngs(key)))(jax.random.split(rngs.params(), count))

        self.groups = nnx.List(
            [
                stacked(lambda rngs, position=position: make_block(position, rngs), num_groups)
                for position in range(self.period if num_groups else 0)
            ]
        )
        self.rest = nnx.List([make_block(position, rngs) for position in range(num_rest)])

        def make_skip(rngs: nnx.Rngs) -> Linear:
            kernel_init = _identity_then_zero if pattern.skip == "identity" else xavier
            return Linear(2 * width, width, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

        self.skips = None if pattern.skip is None else stacked(make_skip, depth // 2 - 1)

    def __call__(
        self, x: Float[Array, "b t d"], c: Float[Array, "b *n d"], grid: Grid
    ) -> Float[Array, "b t d"]:
        """Run all blocks on tokens in raster order on a grid, under the condition c of each image."""
        return self.run(x, c, grid, ()).output

    def run(
        self,
        x: Float[Array, "b t d"],
        c: Float[Array, "b *n d"],
        grid: Grid,
        taps: Collection[int],
        features: StackFeatures | Literal["keep"] | None = None,
        then: Mapping[int, Callable[[Array], Array]] = MappingProxyType({}),
        kept: Float[Array, "depth b"] | None = None,
    ) -> StackOutputs:
        """Run all blocks.

        Scanned segments are cut after tapped blocks, so that no other block's output is kept.

        Args:
            taps: indices of blocks whose outputs are returned.
            features: "keep" returns the outputs of mixers and MLPs; those of a call with the same taps take
                the place of their computation.
            then: by the index of a block, a function of its output that gives the input of the next block;
                not with long skips.
            kept: factor of what each block adds to an image before its convolution (stochastic depth).
        """
        stored: list[list[Array]] = []
        hidden: dict[int, Array] = {}
        made: StackFeatures = []

        def run_piece(segment: Segment, x: Array, joins: list | None) -> tuple[Array, list[Array]]:
            given = features[len(made)] if isinstance(features, list) else features
            x, outputs, piece_features = self._run(segment, x, joins, c, grid, given, kept)
            made.append(piece_features)
            return x, outputs

        for segment in self.segments:
            if segment.skip == "store":
                x, outputs = run_piece(segment, x, None)
                stored.append(outputs)
                hidden |= _tapped(segment, outputs, taps)
                continue
            joins = self._joins(segment, stored.pop(), grid) if segment.skip == "join" else None
            for piece in segment.after({*taps, *then}):
                x, _ = run_piece(piece, x, joins and segment.part(piece, joins))
                if (last := piece.start + piece.num_blocks - 1) in taps:
                    hidden[last] = x
                x = then[last](x) if last in then else x
        return StackOutputs(x, hidden, made)

    def _run(
        self,
        segment: Segment,
        x: Array,
        joins: list | None,
        c: Array,
        grid: Grid,
        features: list[Features] | Literal["keep"] | None,
        kept: Array | None,
    ) -> tuple[Array, list[Array], list[Features]]:
        """Run a segment; return its output, with skip="store" the outputs of each block, and kept features.

        If the segment is scanned, parameters, skips, outputs and features have a leading axis `repeats`.
        """
        given = None if features == "keep" else features
        layers = [self._layers(segment, number) for number in range(segment.size)]
        graphdefs, params = zip(*layers, strict=True)
        if kept is not None:
            kept = kept[segment.start : segment.start + segment.num_blocks]
            kept = kept if segment.repeats is None else kept.reshape(segment.repeats, segment.size, -1)

        def run_block(
            graphdef: nnx.GraphDef,
            x: Array,
            params: Any,
            joined: tuple | None,
            given: Any,
            kept: Array | None,
        ) -> tuple[Array, Features]:
            if joined is not None:
                skip, join_params = joined
                join = self._ready(nnx.split(self.skips)[0], join_params)
                x = join(jnp.concatenate([x, skip], axis=-1))
            block: Any = self._ready(graphdef, params)
            return block.run(x, c, grid, given, kept)

        def body(x: Array, inputs: tuple) -> tuple[Array, tuple[list[Array], list[Features]]]:
            params, joins, given, kept = inputs
            outputs, made = [], []
            for number, graphdef in enumerate(graphdefs):
                run = functools.partial(run_block, graphdef)
                own = [None if part is None else part[number] for part in (joins, given, kept)]
                if self.remat == "block":
                    run = rematerialized_block(run, repeated=not self.scan_layers)
                x, block_features = run(x, params[number], *own)
                if features == "keep":
                    made.append(block_features)
                if segment.skip == "store":
                    outputs.append(x)
            return x, (outputs, made)

        if self.remat != "block":
            body = rematerialized(body, self.remat)
        inputs = params, joins, given, kept
        if segment.repeats is None:
            x, (outputs, made) = body(x, inputs)
        else:
            x, (outputs, made) = jax.lax.scan(body, x, inputs, unroll=not self.scan_layers)
        return x, outputs, made

    def _layers(self, segment: Segment, number: int) -> tuple[nnx.GraphDef, Any]:
        """Return the graphdef and the parameters of block `number` of a segment."""
        layer, position = divmod(segment.start + number, self.period)
        if layer == self.depth // self.period:
            return nnx.split(self.rest[position])
        graphdef, params = nnx.split(self.groups[position])
        return graphdef, _layers_of(params, layer, segment.repeats)

    def _joins(self, segment: Segment, outputs: list[Array], grid: Grid) -> list[tuple[Array, Any]]:
        """Return the skip and the parameters of the joining map for each block of a segment.

        Args:
            outputs: the outputs of the storing segment, in the order of its blocks.
        """
        params = nnx.split(self.skips)[1]
        first = segment.start - self.depth // 2 - 1
        joins = []
        for number, skip in enumerate(reversed(outputs)):
            if segment.repeats is not None:
                skip = skip[::-1]  # the first repetition joins outputs of the last one
            # The depth is even, so odd blocks join outputs of even blocks.
            if self.transposed_skips and (segment.start + number) % 2:
                assert not isinstance(grid, PackedGrids)
                on_grid = skip.reshape(*skip.shape[:-2], *grid, skip.shape[-1])
                skip = on_grid.swapaxes(-3, -2).reshape(skip.shape)
            joins.append((skip, _layers_of(params, first + number, segment.repeats, step=segment.size)))
        return joins

    def _ready(self, graphdef: nnx.GraphDef, params: Any) -> nnx.Module:
        """Return a module with its parameters gathered for computation."""
        return nnx.merge(graphdef, gather_params(nnx.to_pure_dict(params), self.dtype))


def _layers_of(params: Any, first: int, count: int | None, step: int = 1) -> Any:
    """Take `count` layers of stacked parameters, or, if it is None, one without the leading axis."""
    index = first if count is None else slice(first, first + step * (count - 1) + 1, step)
    return jax.tree.map(lambda leaf: leaf[index], params)


def _tapped(segment: Segment, outputs: list[Array], taps: Collection[int]) -> dict[int, Array]:
    """Return the outputs of tapped blocks from those of all blocks of a segment."""
    found = {}
    for tap in taps:
        repeat, number = divmod(tap - segment.start, segment.size)
        if 0 <= tap - segment.start < segment.num_blocks:
            found[tap] = outputs[number] if segment.repeats is None else outputs[number][repeat]
    return found


def _identity_then_zero(_key: Array, shape: tuple[int, ...], dtype: DTypeLike, **_) -> Array:
    return jnp.eye(*shape, dtype=dtype)
