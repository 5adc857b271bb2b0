"""DiG: gated linear attention in four scan directions (Zhu et al. 2025)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from dig_jax.models.block_stack import BlockPattern, SkipKind
from dig_jax.models.blocks import BlockSpec, ConvPlacement
from dig_jax.models.layers import GeluMLP, NormKind, SwiGLU
from dig_jax.models.mixers import GatedLinearAttention, LocalAttention, SoftmaxAttention, parse_half_life
from dig_jax.models.mixers.pattern import parse_pattern
from dig_jax.models.options import Level, ModelOptions

# The blocks with GLA take turns in these. Tokens stay in raster order; the kernel takes the direction.
DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAOptions(ModelOptions):
    """Options of models with DiG's block.

    Args:
        mixer: "gla", "softmax", "local", or a pattern of them that repeats, such as "gla*3+softmax".
        window: rows and columns of the windows of local attention, an odd number.
        gate_normalizer: tokens after which a state is halved at initialization: a number, one per head,
            "grid" (the length of a line), or "spread" (per head, from half a line to the whole image).
        key_expansion, value_expansion: widths of GLA's keys and values, as multiples of the width.
        directions: 4, 2 (row and row reversed) or 1 (row).
        conv: the 3×3 depthwise convolution "after" the block, "inside" it, or None.
        norm: "layer" (no affine parameters) or "rms" (with a weight), in the blocks.
        mlp: "swiglu" without biases, or "gelu" as in DiT, whose parameters it can inherit; None: "swiglu".
        qk_norm, rope: RMSNorm and rotary positions of queries and keys in the blocks with softmax attention.
        implementation: backend of `pallas_gla`; None selects the best available one.
    """

    mixer: str = "gla"
    window: int = 9
    gate_normalizer: float | str | Sequence[float] = 16.0
    key_expansion: float = 0.5
    value_expansion: float = 1.0
    directions: Literal[4, 2, 1] = 4
    conv: ConvPlacement | None = "after"
    norm: NormKind = "layer"
    mlp: Literal["swiglu", "gelu"] | None = None
    qk_norm: bool = False
    rope: bool = False
    implementation: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "mlp", self.mlp or "swiglu")
        super().__post_init__()
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"invalid window={self.window}; expected an odd number")
        half_life = parse_half_life(self.gate_normalizer)
        object.__setattr__(self, "gate_normalizer", half_life)
        for name in ("qk_norm", "rope"):
            if getattr(self, name) and not any("softmax" in self.mixers(level) for level in self.levels):
                raise ValueError(
                    f"invalid {name}=True for mixer={self.mixer!r}; expected blocks with softmax attention"
                )
        for level in self.levels:
            if isinstance(half_life, tuple) and len(half_life) != self.heads_at(level):
                raise ValueError(
                    f"invalid gate_normalizer: got {len(half_life)} numbers for {self.heads_at(level)} heads;"
                    " expected one number, one per head, 'grid' or 'spread'"
                )
            text, mixers = self.mixer_of(level), self.mixers(level)
            if level.depth % len(mixers):
                where = (
                    f"depth={level.depth}" if len(self.levels) == 1 else f"a level of {level.depth} blocks"
                )
                raise ValueError(
                    f"invalid mixer={text!r} for {where}; expected a pattern whose {len(mixers)} blocks"
                    f" divide {level.depth}"
                )

    def mixer_of(self, level: Level) -> str:
        """Return the pattern of a level's mixers as text."""
        del level
        return self.mixer

    def mixers(self, level: Level) -> tuple[str, ...]:
        """Return the mixers of one pattern of a level."""
        return parse_pattern(self.mixer_of(level))

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for an image size that the model does not support."""
        super().check_size(height, width)
        for level in self.levels:
            grid = [side // (self.patch_size * level.stride) for side in (height, width)]
            if "local" in self.mixers(level) and self.window > min(grid):
                raise ValueError(
                    f"invalid window={self.window} for an input of {height} × {width}: got"
                    f" {grid[0]} × {grid[1]} tokens; expected a window of at most {min(grid)}"
                )

    @staticmethod
    def default_mlp_hidden_size(hidden_size: int) -> int:
        """Return 8/3 of the width, rounded up to a multiple of 256, as in the released code."""
        return 256 * -(-int(8 / 3 * hidden_size) // 256)

    def mlp_width_at(self, level: Level) -> int:
        """Return the hidden channels of the MLP."""
        if self.mlp == "gelu" and self.mlp_hidden_size is None:
            return 4 * level.width
        return super().mlp_width_at(level)

    def pattern(self, level: Level) -> BlockPattern:
        """Return the blocks of a level until mixers and scan directions repeat.

        The blocks with GLA take turns in the scan directions, so that information moves all ways whatever
        stands between them. The directions start again after the least number of patterns with a scan in
        each, also with fewer directions.
        """
        mixers = self.mixers(level)
        if scans := mixers.count("gla"):
            mixers *= -(-len(DIRECTIONS) // scans)
        first = self._scans_before(level)
        mlp = SwiGLU if self.mlp == "swiglu" else GeluMLP
        mlp = functools.partial(mlp, hidden=self.mlp_width_at(level))
        blocks = tuple(
            BlockSpec(
                mixer=self._mixer(mixer, level, first + mixers[:position].count("gla")),
                mlp=mlp,
                mlp_parts=self.mlp_parts,
                conv=self.conv,
                norm=self.norm,
            )
            for position, mixer in enumerate(mixers)
        )
        return BlockPattern(blocks)

    def _scans_before(self, level: Level) -> int:
        """Return the number of blocks with GLA in the levels before."""
        count = 0
        for each in self.levels:
            if each.start < level.start:
                mixers = self.mixers(each)
                count += mixers.count("gla") * each.depth // len(mixers)
        return count

    def _mixer(self, name: str, level: Level, scan: int) -> functools.partial:
        heads = self.heads_at(level)
        if name == "softmax":
            return functools.partial(
                SoftmaxAttention,
                num_heads=heads,
                qk_norm=self.qk_norm,
                rope=self.rope,
                fused=not self.flow_map,
            )
        if name == "local":
            return functools.partial(LocalAttention, num_heads=heads, window=self.window)
        return functools.partial(
            GatedLinearAttention,
            num_heads=heads,
            direction=DIRECTIONS[scan % self.directions],
            gate_normalizer=parse_half_life(self.gate_normalizer),
            key_expansion=self.key_expansion,
            value_expansion=self.value_expansion,
            implementation=self.implementation,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiGOptions(GLAOptions):
    """Options of DiG.

    Args:
        skip: long skips: None, "linear", or "identity", which differs only in its initialization.
        skip_alignment: "raster" joins each token's skip with the same token; "upstream" reproduces the
            released code, where half of the skips arrive with rows and columns exchanged.
    """

    skip: SkipKind | None = None
    skip_alignment: Literal["raster", "upstream"] = "raster"

    def __post_init__(self):
        super().__post_init__()
        if self._transposed_skips and (self.directions != 4 or self.depth % 4):
            raise ValueError(
                f'invalid skip_alignment="upstream" with directions={self.directions} and depth={self.depth};'
                " expected directions=4 and a depth that is a multiple of 4"
            )

    @property
    def _transposed_skips(self) -> bool:
        return self.skip is not None and self.skip_alignment == "upstream"

    @property
    def packable(self) -> bool:
        """Without skips whose rows and columns are exchanged."""
        return not self._transposed_skips

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for an image size that the model does not support."""
        super().check_size(height, width)
        if self._transposed_skips and height != width:
            raise ValueError(
                f'invalid input {height}×{width} with skip_alignment="upstream"; expected a square'
            )

    def pattern(self, level: Level) -> BlockPattern:
        """Return the blocks of a level, with long skips."""
        pattern = super().pattern(level)
        return dataclasses.replace(pattern, skip=self.skip, transposed_skips=self._transposed_skips)
