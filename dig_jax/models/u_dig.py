"""U-DiG: DiG's blocks on three resolutions, in the shape of a U (Zhu et al. 2025, figure 3).

The paper draws it without sizes and no code was released. The sizes here match the parameters of the plain
models. The paths between levels are those of U-DiT (Tian et al. 2024) and DiCo (Ai et al. 2025), with linear
maps instead of 3×3 convolutions.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.models.backbone import Condition, DiffusionTransformer, LevelOutputs, coarser, make_stage
from dig_jax.models.block_stack import StackOutputs
from dig_jax.models.dig import GLAOptions
from dig_jax.models.embeddings import patchify, unpatchify
from dig_jax.models.layers import Linear, xavier
from dig_jax.models.options import Level
from dig_jax.parallel import constrain_tokens

_STRIDES = (1, 2, 4, 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UDiGOptions(GLAOptions):
    """Options of U-DiG; `hidden_size` and `num_heads` apply to the first level.

    The five levels have hidden_size times 1, 2, 4, 2 and 1 channels. The four outer ones have depth // 6
    blocks each, the middle one has the others. The scan directions go on from level to level, so that levels
    of two blocks have rows on the way down and columns on the way up.

    Args:
        bottleneck_mixer: pattern of the mixers of the middle level; None: `mixer`, as in the others.
        wide_end: the last level has 2 × hidden_size channels, as in U-DiT, instead of hidden_size.

    Raises:
        ValueError: less than five blocks.
    """

    bottleneck_mixer: str | None = None
    wide_end: bool = False

    def __post_init__(self):
        if self.depth < len(_STRIDES):
            raise ValueError(f"invalid depth={self.depth}; expected at least {len(_STRIDES)}, one per level")
        super().__post_init__()

    @property
    def size_step(self) -> int:
        """Two tokens of the first level: `Down` fills up the second one."""
        return 2 * self.patch_size

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels in the order in which they run: down to the coarsest grid and up again."""
        outer = max(self.depth // 6, 1)
        widths = [self.hidden_size * stride for stride in _STRIDES]
        widths[-1] *= 2 if self.wide_end else 1
        levels, start = [], 0
        for depth, width, stride in zip(
            (outer, outer, self.depth - 4 * outer, outer, outer), widths, _STRIDES, strict=True
        ):
            levels.append(Level(start, depth, width, stride))
            start += depth
        return tuple(levels)

    def mixer_of(self, level: Level) -> str:
        """Return the pattern of a level's mixers as text."""
        is_bottleneck = level.stride == max(_STRIDES)
        return self.mixer if self.bottleneck_mixer is None or not is_bottleneck else self.bottleneck_mixer


class Down(nnx.Module):
    """Halve the grid and double the channels: a linear map, then 2×2 tokens side by side.

    An odd number of rows or columns is filled up with zeros.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(width, width // 2, use_bias=False, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b merged 2*d"]:
        """Merge the tokens of a grid of (rows, columns)."""
        x = self.linear(x)
        if grid[0] % 2 or grid[1] % 2:
            x = x.reshape(x.shape[0], *grid, -1)
            x = jnp.pad(x, ((0, 0), (0, grid[0] % 2), (0, grid[1] % 2), (0, 0)))
            grid = x.shape[1], x.shape[2]
            x = x.reshape(x.shape[0], grid[0] * grid[1], -1)
        return constrain_tokens(unshuffle(x, grid))


class Up(nnx.Module):
    """Double the grid and halve the channels: a linear map, then its channels as 2×2 tokens; join a skip."""

    def __init__(self, width: int, width_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.linear = Linear(width, 2 * width, use_bias=False, **options)
        self.join = Linear(width, width_out, **options)

    def __call__(
        self,
        x: Float[Array, "b merged d"],
        grid: tuple[int, int],
        skip: Float[Array, "b t d/2"],
        finer: tuple[int, int],
    ) -> Float[Array, "b t out"]:
        """Divide the tokens of a grid of (rows, columns), and join the tokens of a level before.

        The finer grid of that level may lack the last row or column.
        """
        x = shuffle(self.linear(x), grid)
        if x.shape[1] > skip.shape[1]:
            image = x.reshape(x.shape[0], 2 * grid[0], 2 * grid[1], -1)[:, : finer[0], : finer[1]]
            x = image.reshape(skip.shape[0], skip.shape[1], -1)
        x = constrain_tokens(x)
        return self.join(jnp.concatenate([x, skip], axis=-1))


def unshuffle(x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t/4 4*d"]:
    """Put the channels of 2×2 tokens side by side, on a grid of (rows, columns) in raster order."""
    return patchify(x.reshape(x.shape[0], *grid, -1), 2)


def shuffle(x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b 4*t d/4"]:
    """Invert `unshuffle`, from the coarser grid."""
    return unpatchify(x, grid, 2).reshape(x.shape[0], 4 * x.shape[1], -1)


class ULevel(nnx.Module):
    """A level with the embeddings of its condition and the path into it from the level before."""

    def __init__(self, options: UDiGOptions, index: int, num_classes: int, *, rngs: nnx.Rngs):
        levels = options.levels
        level, before = levels[index], levels[index - 1]
        is_down, is_up = (
            index > 0 and level.stride > before.stride,
            index > 0 and level.stride < before.stride,
        )
        self.down = Down(before.width, dtype=options.dtype, rngs=rngs) if is_down else None
        self.up = Up(before.width, level.width, dtype=options.dtype, rngs=rngs) if is_up else None
        self.time_embed, self.label_embed, self.jump_embed, self.blocks = make_stage(
            options, level, num_classes, rngs
        )


class UShapedTransformer(DiffusionTransformer):
    """A denoiser of images with levels down to a coarse grid and up again, and one skip per resolution."""

    def _add_levels(self, rngs: nnx.Rngs) -> None:
        options = self.options
        assert isinstance(options, UDiGOptions)
        self.levels = nnx.List(
            [ULevel(options, index, self.num_classes, rngs=rngs) for index in range(len(options.levels))]
        )

    def _run_levels(
        self, x: Array, condition: Condition, grid: tuple[int, int], taps: Collection[int], features: Any
    ) -> LevelOutputs:
        """Run all levels. Every level drops the same labels."""
        hidden, made, conditions, skips = {}, [], {}, []
        at = grid
        for index, (level, module) in enumerate(zip(self.options.levels, self.levels, strict=True)):
            if module.down is not None:
                skips.append(x)
                x = module.down(x, at)
            elif module.up is not None:
                x = module.up(x, at, skips.pop(), coarser(grid, level.stride))
            at = coarser(grid, level.stride)
            c = conditions[level] = condition.embedded(module)
            own = [tap - level.start for tap in taps if 0 <= tap - level.start < level.depth]
            given = features[index] if isinstance(features, list) else features
            kept = condition.kept
            kept = None if kept is None else kept[level.start : level.start + level.depth]
            outputs = module.blocks.run(x, c, at, own, given, kept=kept)
            x = outputs.output
            hidden |= {level.start + block: tokens for block, tokens in outputs.hidden.items()}
            made.append(outputs.features)
        return LevelOutputs(StackOutputs(x, hidden, made), conditions)
