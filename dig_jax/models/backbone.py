"""Embeddings, a stack of blocks and the final layer: the diffusion transformer (DiT, figure 3)."""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dig_jax.models.block_stack import BlockStack, StackFeatures, StackOutputs
from dig_jax.models.blocks import FinalLayer
from dig_jax.models.embeddings import (
    JumpEmbedding,
    LabelEmbedding,
    TimestepEmbedding,
    patchify,
    sincos_positions,
    unpatchify,
)
from dig_jax.models.layers import Linear, xavier
from dig_jax.models.options import Level, ModelOptions
from dig_jax.models.packing import Grid, PackedGrids, check_packable
from dig_jax.parallel import constrain_batch, constrain_rows, context_size


class Outputs(NamedTuple):
    """What a model computes for noisy images.

    Attributes:
        output: the prediction.
        internal: the prediction of the internal head, or None without one.
        hidden: tokens after each tapped block, by the block's index, in the dtype of activations.
        features: outputs of mixers and MLPs before their gates, if they are kept.
    """

    output: Float[Array, "b height width out"]
    internal: Float[Array, "b height width out"] | None
    hidden: dict[int, Float[Array, "b t d"]]
    features: StackFeatures | list[StackFeatures]


class Stage(NamedTuple):
    """The blocks of a level with the embeddings of their condition."""

    time_embed: TimestepEmbedding
    label_embed: LabelEmbedding | None
    jump_embed: JumpEmbedding | None
    blocks: BlockStack


def make_stage(options: ModelOptions, level: Level, num_classes: int, rngs: nnx.Rngs) -> Stage:
    """Return the modules of a level with random parameters."""
    time_embed = TimestepEmbedding(level.width, rngs=rngs)
    label_embed = LabelEmbedding(num_classes, level.width, rngs=rngs) if num_classes else None
    jump_embed = JumpEmbedding(level.width, rngs=rngs) if options.flow_map else None
    blocks = BlockStack(
        options.pattern(level),
        width=level.width,
        depth=level.depth,
        remat=options.remat,
        scan_layers=options.scan_layers,
        dtype=options.dtype,
        rngs=rngs,
    )
    return Stage(time_embed, label_embed, jump_embed, blocks)


@runtime_checkable
class Embeddings(Protocol):
    """The embeddings of a condition."""

    time_embed: TimestepEmbedding
    label_embed: LabelEmbedding | None
    jump_embed: JumpEmbedding | None


class Condition(NamedTuple):
    """What a model is asked for: timesteps, labels or None, and which labels are dropped.

    One per image: [b], or for n packed images [b, n]. `kept` is that of `BlockStack.run` for all blocks,
    `jump` that of `DiffusionTransformer`.
    """

    t: Float[Array, "*b"] | Int[Array, "*b"]
    y: Int[Array, "*b"] | None
    drop: Bool[Array, "*b"] | None
    kept: Float[Array, "blocks b"] | None = None
    jump: Float[Array, "*b 4"] | None = None

    def embedded(self, embeddings: Embeddings) -> Float[Array, "*b d"]:
        """Return the sum of the embeddings of timestep, label and jump."""
        c = embeddings.time_embed(self.t)
        if embeddings.label_embed is not None:
            c = c + embeddings.label_embed(self.y, self.drop, self.t)
        if embeddings.jump_embed is not None:
            c = c + embeddings.jump_embed(self.jump, self.t)
        return constrain_batch(c)


class LevelOutputs(NamedTuple):
    """What the blocks of all levels compute.

    Attributes:
        stack: the output of the last level, and tapped tokens by the index of the block in the network.
        conditions: the embedded condition by level.
    """

    stack: StackOutputs
    conditions: dict[Level, Float[Array, "b d"]]


class DiffusionTransformer(nnx.Module):
    """A denoiser of images [b, height, width, c].

    Args:
        family: name of the model family, such as "DiG".
        input_size: (height, width) in pixels or latent pixels.
        num_classes: 0 for an unconditional model, which has no label table and no modulation of the final
            layer.
    """

    def __init__(
        self,
        family: str,
        options: ModelOptions,
        *,
        input_size: tuple[int, int],
        num_classes: int,
        rngs: nnx.Rngs,
    ):
        self._set_sizes(family, options, input_size, num_classes)
        self.patch_embed = self._patch_embedding(rngs)
        self._add_levels(rngs)
        head = options.internal_head
        self.final = self._final_layer(options.levels[-1], rngs)
        self.internal = None if head is None else self._final_layer(options.level_of(head), rngs)

    def _set_sizes(
        self, family: str, options: ModelOptions, input_size: tuple[int, int], num_classes: int
    ) -> None:
        """Check the arguments of the constructor and keep them as attributes."""
        options.check_size(*input_size)
        if num_classes < 0:
            raise ValueError(f"invalid num_classes={num_classes}; expected 0 (unconditional) or more")
        self.family, self.options = family, options
        self.input_size, self.num_classes = input_size, num_classes
        self.patch_size, self.in_channels = options.patch_size, options.in_channels
        self.learn_sigma, self.hidden_size = options.learn_sigma, options.hidden_size

    @property
    def patch_channels(self) -> int:
        """Number of values in a patch of the image."""
        return self.patch_size**2 * self.in_channels

    def _patch_embedding(self, rngs: nnx.Rngs) -> nnx.Module:
        """Return the module that makes a token of a patch."""
        return Linear(
            self.patch_channels, self.hidden_size, kernel_init=xavier, dtype=self.options.dtype, rngs=rngs
        )

    def _add_levels(self, rngs: nnx.Rngs) -> None:
        """Add the modules of the levels, here of the only one."""
        (level,) = self.options.levels
        self.time_embed, self.label_embed, self.jump_embed, self.blocks = make_stage(
            self.options, level, self.num_classes, rngs
        )

    def _final_layer(self, level: Level, rngs: nnx.Rngs) -> FinalLayer:
        """Return a layer that predicts from tokens of a level."""
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        out_size = (self.patch_size * level.stride) ** 2 * channels
        modulated, norm = self.num_classes > 0, self.options.final_norm
        return FinalLayer(
            level.width, out_size, modulated=modulated, norm=norm, dtype=self.options.dtype, rngs=rngs
        )

    def __call__(
        self,
        x: Float[Array, "b height width c"],
        t: Float[Array, " b"] | Int[Array, " b"],
        y: Int[Array, " b"] | None = None,
        *,
        drop: Bool[Array, " b"] | None = None,
        jump: Float[Array, "b 4"] | None = None,
    ) -> Float[Array, "b height width out"]:
        """Predict the noise and, with `learn_sigma`, the interpolation of the variance, in float32.

        Args:
            x: noisy images of any size that the patches and the levels divide.
            t: timesteps in 0…1000.
            y: labels; the null class has the index num_classes, and `y=None` selects it for all images.
            drop: True replaces an image's label with the null class.
            jump: with `flow_map`, what to predict the average velocity for (`JumpEmbedding`); None: the
                velocity at t without guidance.

        Raises:
            ValueError: an image size that the model does not support, or a jump without `flow_map`.
        """
        (stack, conditions), grid = self._run_blocks(x, Condition(t, y, drop, jump=jump), ())
        return self._image(self.final, stack.output, self.options.levels[-1], conditions, grid)

    def packed(
        self,
        images: Sequence[Float[Array, "b _height _width c"]],
        t: Float[Array, "b n"] | Int[Array, "b n"],
        y: Int[Array, "b n"] | None = None,
        *,
        drop: Bool[Array, "b n"] | None = None,
    ) -> list[Float[Array, "b _height _width out"]]:
        """Predict for n images of any sizes per sequence of tokens (`packing.py`).

        Each image gets what a call with it alone returns, up to rounding.

        Args:
            images: n batches of noisy images, each of one size; sequence i holds image i of each batch.
            t: timesteps in 0…1000.
            y: labels, as in a call.
            drop: as in a call.

        Returns:
            The prediction for each batch of images.

        Raises:
            ValueError: an image size, model or mesh that does not support it, or numbers that do not match.
        """
        check_packable(self.options.packable, images, t)
        for x in images:
            self.options.check_size(*x.shape[1:3])
        grids = PackedGrids(
            tuple((x.shape[1] // self.patch_size, x.shape[2] // self.patch_size) for x in images)
        )
        tokens = self.patch_embed(jnp.concatenate([patchify(x, self.patch_size) for x in images], axis=1))
        positions = np.concatenate([self._positions(grid) for grid in grids.grids])
        tokens = tokens + jnp.asarray(positions, tokens.dtype)
        stack, conditions = self._run_levels(tokens, Condition(t, y, drop), grids, (), None)
        (level,) = self.options.levels
        return [
            self._image(self.final, own, level, {level: conditions[level][:, index]}, grid)
            for index, (own, grid) in enumerate(grids.split(stack.output))
        ]

    def _positions(self, grid: tuple[int, int]) -> Float[np.ndarray, "t d"]:
        """Return the positions of the tokens of a grid."""
        span = None
        if self.options.positions == "interpolated":
            span = (self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size)
        return sincos_positions(grid, self.hidden_size, span)

    def outputs(
        self,
        x: Float[Array, "b height width c"],
        t: Float[Array, " b"] | Int[Array, " b"],
        y: Int[Array, " b"] | None = None,
        *,
        drop: Bool[Array, " b"] | None = None,
        taps: Collection[int] = (),
        features: StackFeatures | list[StackFeatures] | Literal["keep"] | None = None,
        kept: Float[Array, "blocks b"] | None = None,
        jump: Float[Array, "b 4"] | None = None,
    ) -> Outputs:
        """Also return the internal head's prediction, and the tokens after each block in `taps`.

        The internal head predicts what the model predicts, from the tokens of an earlier block (Internal
        Guidance, CVPR 2026). `features` and `kept` are those of `BlockStack.run`.

        Raises:
            ValueError: a tap is not the index of a block.
        """
        head = self.options.internal_head
        tapped = {*taps} if head is None else {*taps, head}
        (stack, conditions), grid = self._run_blocks(x, Condition(t, y, drop, kept, jump), tapped, features)
        internal = None
        if head is not None and self.internal is not None:
            level = self.options.level_of(head)
            internal = self._image(self.internal, stack.hidden[head], level, conditions, grid)
        output = self._image(self.final, stack.output, self.options.levels[-1], conditions, grid)
        return Outputs(output, internal, {block: stack.hidden[block] for block in taps}, stack.features)

    def _run_blocks(
        self, x: Array, condition: Condition, taps: Collection[int], features: Any = None
    ) -> tuple[LevelOutputs, tuple[int, int]]:
        """Return what the blocks compute, and the grid of the first level."""
        height, width = x.shape[1:3]
        self.options.check_size(height, width)
        grid = (height // self.patch_size, width // self.patch_size)
        stride = max(level.stride for level in self.options.levels)
        if context_size() > 1 and grid[0] % (stride * context_size()):
            levels = f", for levels with 1/{stride} of the rows" if stride > 1 else ""
            raise ValueError(
                f"invalid input height {height}: got {grid[0]} rows of tokens; expected a multiple of"
                f" {stride * context_size()}, with {context_size()} devices of mesh axis context{levels}"
            )
        self._check_jump(condition.jump)
        for tap in taps:
            if not 0 <= tap < self.options.depth:
                raise ValueError(f"block out of range: got {tap}; expected 0 … {self.options.depth - 1}")
        tokens = self.patch_embed(patchify(constrain_rows(x), self.patch_size))
        tokens = tokens + jnp.asarray(self._positions(grid), tokens.dtype)
        return self._run_levels(tokens, condition, grid, taps, features), grid

    def _check_jump(self, jump: Array | None) -> None:
        if jump is not None and not self.options.flow_map:
            raise ValueError("unsupported jump without flow_map; expected None")

    def _run_levels(
        self, x: Array, condition: Condition, grid: Grid, taps: Collection[int], features: Any
    ) -> LevelOutputs:
        """Run the blocks of all levels, here of the only one."""
        (level,) = self.options.levels
        c = condition.embedded(self)
        return LevelOutputs(self.blocks.run(x, c, grid, taps, features, kept=condition.kept), {level: c})

    def _image(
        self,
        final: FinalLayer,
        tokens: Array,
        level: Level,
        conditions: dict[Level, Array],
        grid: tuple[int, int],
    ) -> Array:
        """Return the prediction of a final layer from tokens of a level, in float32."""
        patches = final(tokens, conditions[level]).astype(jnp.float32)
        image = unpatchify(patches, coarser(grid, level.stride), self.patch_size * level.stride)
        return image[:, : grid[0] * self.patch_size, : grid[1] * self.patch_size]


def coarser(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return (rows, columns) with one token per `stride` × `stride` tokens, also for a part of them."""
    return -(-grid[0] // stride), -(-grid[1] // stride)
