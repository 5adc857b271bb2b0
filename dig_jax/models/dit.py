"""DiT, the softmax attention baseline under the same recipe (Peebles & Xie 2023), and its modern variants."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dig_jax.models.backbone import Condition, DiffusionTransformer, LevelOutputs
from dig_jax.models.block_stack import BlockPattern
from dig_jax.models.blocks import BlockSpec
from dig_jax.models.embeddings import BottleneckEmbedding, ClassTokens
from dig_jax.models.layers import GeluMLP, NormKind, SwiGLU
from dig_jax.models.mixers import SoftmaxAttention
from dig_jax.models.options import Level, ModelOptions
from dig_jax.models.packing import Grid
from dig_jax.parallel import context_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTOptions(ModelOptions):
    """Options of DiT; the defaults are the paper's.

    Args:
        norm: "layer" (no affine parameters) or "rms" (with a weight), in the blocks and the final layer.
        mlp: "gelu", or "swiglu" with biases and by default 8/3 of the width (LightningDiT, Yao et al. 2025);
            None: "gelu".
        qk_norm: RMSNorm of queries and keys.
        rope: rotary positions in addition to the fixed ones.
        class_tokens: number of tokens with the label's embedding that attention sees beside the image.
        class_tokens_from: index of the first block that sees them.
        patch_bottleneck: channels between the two linear maps of a patch (Li & He 2025, JiT); None: one map.
        time_input: what the time embedding gets: "steps" (t in 0…1000), "noise" (t/1000, as in REPA) or
            "data" (1 - t/1000, as in SiT and LightningDiT).
    """

    norm: NormKind = "layer"
    mlp: Literal["gelu", "swiglu"] | None = None
    qk_norm: bool = False
    rope: bool = False
    class_tokens: int = 0
    class_tokens_from: int = 0
    patch_bottleneck: int | None = None
    time_input: Literal["steps", "noise", "data"] = "steps"

    def __post_init__(self):
        object.__setattr__(self, "mlp", self.mlp or "gelu")
        super().__post_init__()
        if self.class_tokens < 0:
            raise ValueError(f"invalid class_tokens={self.class_tokens}; expected 0 or a positive number")
        if not 0 <= self.class_tokens_from < self.depth:
            raise ValueError(
                f"invalid class_tokens_from={self.class_tokens_from}; expected the index of a block, at most"
                f" {self.depth - 1} for depth={self.depth}"
            )
        if self.patch_bottleneck is not None and self.patch_bottleneck < 1:
            raise ValueError(
                f"invalid patch_bottleneck={self.patch_bottleneck}; expected None or a positive number"
            )

    @property
    def packable(self) -> bool:
        """Without class tokens, which precede the tokens of one image."""
        return not self.class_tokens

    @property
    def final_norm(self) -> NormKind:
        """Norm of the final layer, the same as in the blocks."""
        return self.norm

    def mlp_width_at(self, level: Level) -> int:
        """Return the hidden channels of the MLP."""
        if self.mlp == "swiglu" and self.mlp_hidden_size is None:
            return 8 * level.width // 3
        return super().mlp_width_at(level)

    def pattern(self, level: Level) -> BlockPattern:
        """Return the one block, with softmax attention."""
        mixer = functools.partial(
            SoftmaxAttention,
            num_heads=self.heads_at(level),
            qk_norm=self.qk_norm,
            rope=self.rope,
            fused=not self.flow_map,
        )
        mlp = functools.partial(SwiGLU, use_bias=True) if self.mlp == "swiglu" else GeluMLP
        mlp = functools.partial(mlp, hidden=self.mlp_width_at(level))
        return BlockPattern((BlockSpec(mixer=mixer, mlp=mlp, mlp_parts=self.mlp_parts, norm=self.norm),))


class DiT(DiffusionTransformer):
    """A denoiser of images whose attention may also see tokens of the class."""

    def _patch_embedding(self, rngs: nnx.Rngs) -> nnx.Module:
        assert isinstance(self.options, DiTOptions)
        size = self.options.patch_bottleneck
        if size is None:
            return super()._patch_embedding(rngs)
        return BottleneckEmbedding(
            self.patch_channels, size, self.hidden_size, dtype=self.options.dtype, rngs=rngs
        )

    def _add_levels(self, rngs: nnx.Rngs) -> None:
        super()._add_levels(rngs)
        options = self.options
        assert isinstance(options, DiTOptions)
        if options.class_tokens and not self.num_classes:
            raise ValueError(f"invalid class_tokens={options.class_tokens} without classes; expected 0")
        count, width = options.class_tokens, options.hidden_size
        self.class_tokens = ClassTokens(count, width, rngs=rngs) if count else None

    def _run_levels(
        self, x: Array, condition: Condition, grid: Grid, taps: Collection[int], features: Any
    ) -> LevelOutputs:
        """Run the blocks, some with the class tokens in front of the image's, which alone are returned."""
        condition = condition._replace(t=_embedded_time(self.options, condition.t))
        if self.class_tokens is None or self.label_embed is None:
            return super()._run_levels(x, condition, grid, taps, features)
        if context_size() > 1:
            raise ValueError(
                f"unsupported class_tokens with {context_size()} devices along mesh axis context; expected 1"
            )
        label = self.label_embed(condition.y, condition.drop, condition.t)
        first = self.class_tokens(label).astype(x.dtype)

        def insert(tokens: Array) -> Array:
            return jnp.concatenate([first, tokens], axis=1)

        (level,), c = self.options.levels, condition.embedded(self)
        assert isinstance(self.options, DiTOptions)
        start = self.options.class_tokens_from
        stack = (
            self.blocks.run(x, c, grid, taps, features, then={start - 1: insert}, kept=condition.kept)
            if start
            else self.blocks.run(insert(x), c, grid, taps, features, kept=condition.kept)
        )
        output, hidden = jax.tree.map(lambda y: y[:, -x.shape[1] :], (stack.output, stack.hidden))
        return LevelOutputs(stack._replace(output=output, hidden=hidden), {level: c})


def _embedded_time(options: ModelOptions, t: Array) -> Array:
    """Return what the time embedding gets for timesteps in 0…1000."""
    assert isinstance(options, DiTOptions)
    if options.time_input == "steps":
        return t
    noise = t.astype(jnp.float32) / 1000
    return noise if options.time_input == "noise" else 1 - noise
