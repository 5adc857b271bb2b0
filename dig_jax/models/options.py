"""Options that all model families share, and the levels of blocks that they describe."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from dig_jax.models.block_stack import BlockPattern
from dig_jax.models.layers import NormKind
from dig_jax.models.rematerialization import Remat


@dataclasses.dataclass(frozen=True)
class Level:
    """Consecutive blocks that see tokens of one width on one grid.

    Args:
        start: index of the first block in the network.
        depth: number of blocks.
        width: channels per token.
        stride: rows and columns of the first level per row and column of this one.
    """

    start: int
    depth: int
    width: int
    stride: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every model family; a `Literal` type lists the choices, which `create_model` checks.

    Args:
        hidden_size: width of the tokens, a multiple of 4.
        patch_size: height and width of a token in pixels.
        in_channels: channels of the image.
        learn_sigma: also predict the interpolation of the variance, which doubles the output channels.
        dtype: dtype of matrix products and activations; parameters are float32.
        remat: what the backward pass recomputes: None (nothing), "dots" (all but matrix products), "full"
            (all but the input of each group of blocks) or "block" (all but the input of each block).
        scan_layers: loop over the blocks in the compiled program instead of repeating them.
        mlp_hidden_size: hidden channels of the MLP; None: the family's default for the width.
        mlp_parts: parts of the tokens that the MLP transforms one after the other, for less memory; without
            effect where devices share the tokens of an image.
        internal_head: index of the block after which a second final layer predicts; None: no such layer.
        positions: coordinates of tokens in images of another size than `input_size`: "absolute", which go on
            beyond it, or "interpolated", which are spread over it.
        drop_path: rate at which training drops what the last block adds, in [0, 1) (stochastic depth).
        flow_map: also take a jump, the end of a step and the guidance on it (`JumpEmbedding`).

    Raises:
        ValueError: an invalid value.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    in_channels: int = 4
    learn_sigma: bool = True
    dtype: DTypeLike = jnp.float32
    remat: Remat | None = None
    scan_layers: bool = True
    mlp_hidden_size: int | None = None
    mlp_parts: int = 1
    internal_head: int | None = None
    positions: Literal["absolute", "interpolated"] = "absolute"
    drop_path: float = 0.0
    flow_map: bool = False

    def __post_init__(self):
        for name in (
            "mlp_width",
            "mlp_parts",
            "depth",
            "hidden_size",
            "num_heads",
            "patch_size",
            "in_channels",
        ):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"invalid {name}={value}; expected a positive number")
        if self.hidden_size % 4:  # sines and cosines of rows and columns
            raise ValueError(f"invalid hidden_size={self.hidden_size}; expected a multiple of 4")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"invalid drop_path={self.drop_path}; expected 0 ≤ drop_path < 1")
        if self.internal_head is not None and not 0 <= self.internal_head < self.depth - 1:
            raise ValueError(
                f"invalid internal_head={self.internal_head}; expected the index of a block before the last"
                f" one, at most {self.depth - 2} for depth={self.depth}"
            )

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels in the order in which they run."""
        return (Level(0, self.depth, self.hidden_size),)

    def level_of(self, block: int) -> Level:
        """Return a block's level."""
        return max((level for level in self.levels if level.start <= block), key=lambda level: level.start)

    def pattern(self, level: Level) -> BlockPattern:
        """Return the blocks of a level."""
        raise NotImplementedError

    def heads_at(self, level: Level) -> int:
        """Return the number of heads: all levels have heads of the same width."""
        return self.num_heads * level.width // self.hidden_size

    def mlp_width_at(self, level: Level) -> int:
        """Return the hidden channels of the MLP; `mlp_hidden_size` is for the width `hidden_size`."""
        if self.mlp_hidden_size is None:
            return self.default_mlp_hidden_size(level.width)
        return self.mlp_hidden_size * level.width // self.hidden_size

    @property
    def drop_rates(self) -> Float[np.ndarray, " blocks"]:
        """Rate of stochastic depth of each block: from 0 to `drop_path` (Huang et al. 2016)."""
        return np.linspace(0, self.drop_path, self.depth)

    @property
    def packable(self) -> bool:
        """Whether several images can run as one sequence of tokens."""
        return len(self.levels) == 1

    @property
    def final_norm(self) -> NormKind:
        """Norm of the final layer."""
        return "layer"

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP in the first level."""
        return self.mlp_width_at(Level(0, self.depth, self.hidden_size))

    @staticmethod
    def default_mlp_hidden_size(hidden_size: int) -> int:
        """Return the hidden channels of the family's MLP for a width of the tokens."""
        return 4 * hidden_size

    @property
    def size_step(self) -> int:
        """Height and width of an image are multiples of this."""
        return self.patch_size

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for an image size that the model does not support."""
        stride = self.size_step // self.patch_size
        expected = f"patch_size={self.patch_size}"
        if stride > 1:
            expected = f"{self.size_step}: {expected}, and a level with 1/{stride} of the rows and columns"
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.size_step:
                raise ValueError(f"invalid input {name} {size}; expected a multiple of {expected}")
