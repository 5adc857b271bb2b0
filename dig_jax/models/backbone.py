"""Embeddings, a stack of blocks and the final layer: the diffusion transformer (DiT, figure 3)."""

import dataclasses
from collections.abc import Collection
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dig_jax.models.block_stack import BlockPattern, BlockStack, Remat, StackFeatures, StackOutputs
from dig_jax.models.blocks import FinalLayer
from dig_jax.models.embeddings import (
    LabelEmbedding,
    TimestepEmbedding,
    patchify,
    sincos_positions,
    unpatchify,
)
from dig_jax.models.layers import Linear, xavier
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
    features: StackFeatures


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of every model family; a `Literal` type lists the choices, which `create_model` checks.

    Args:
        hidden_size: width of the tokens, a multiple of 4.
        patch_size: height and width of a token in pixels.
        in_channels: channels of the image.
        learn_sigma: also predict the interpolation of the variance, which doubles the output channels.
        dtype: dtype of matrix products and activations; parameters are float32.
        remat: what the backward pass recomputes: None (nothing), "dots" (all but matrix products) or "full".
        scan_layers: loop over the blocks in the compiled program instead of repeating them.
        mlp_hidden_size: hidden channels of the MLP; None: the family's default for the width.
        internal_head: index of the block after which a second final layer predicts; None: no such layer.

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
    internal_head: int | None = None

    def __post_init__(self):
        for name in ("mlp_width", "depth", "hidden_size", "num_heads", "patch_size", "in_channels"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"invalid {name}={value}; expected a positive number")
        if self.hidden_size % 4:  # sines and cosines of rows and columns
            raise ValueError(f"invalid hidden_size={self.hidden_size}; expected a multiple of 4")
        if self.internal_head is not None and not 0 <= self.internal_head < self.depth - 1:
            raise ValueError(
                f"invalid internal_head={self.internal_head}; expected the index of a block before the last"
                f" one, at most {self.depth - 2} for depth={self.depth}"
            )

    def pattern(self) -> BlockPattern:
        """Return the blocks that these options describe."""
        raise NotImplementedError

    @property
    def mlp_width(self) -> int:
        """Hidden channels of the MLP."""
        given = self.mlp_hidden_size
        return self.default_mlp_hidden_size(self.hidden_size) if given is None else given

    @staticmethod
    def default_mlp_hidden_size(hidden_size: int) -> int:
        """Return the hidden channels of the family's MLP for a width of the tokens."""
        return 4 * hidden_size

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for an image size that the model does not support."""
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.patch_size:
                raise ValueError(
                    f"invalid input {name} {size}; expected a multiple of patch_size={self.patch_size}"
                )


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
        options.check_size(*input_size)
        if num_classes < 0:
            raise ValueError(f"invalid num_classes={num_classes}; expected 0 (unconditional) or more")
        self.family, self.options = family, options
        self.input_size, self.num_classes = input_size, num_classes
        self.patch_size, self.in_channels = options.patch_size, options.in_channels
        self.learn_sigma, self.hidden_size = options.learn_sigma, options.hidden_size
        width, dtype = options.hidden_size, options.dtype
        in_size = options.patch_size**2 * options.in_channels
        self.patch_embed = Linear(in_size, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.time_embed = TimestepEmbedding(width, rngs=rngs)
        self.label_embed = LabelEmbedding(num_classes, width, rngs=rngs) if num_classes else None
        self.blocks = BlockStack(
            options.pattern(),
            width=width,
            depth=options.depth,
            remat=options.remat,
            scan_layers=options.scan_layers,
            dtype=dtype,
            rngs=rngs,
        )
        out_size = in_size * (2 if options.learn_sigma else 1)

        def make_final() -> FinalLayer:
            return FinalLayer(width, out_size, modulated=num_classes > 0, dtype=dtype, rngs=rngs)

        self.final = make_final()
        self.internal = None if options.internal_head is None else make_final()

    def __call__(
        self,
        x: Float[Array, "b height width c"],
        t: Float[Array, " b"] | Int[Array, " b"],
        y: Int[Array, " b"] | None = None,
        *,
        drop: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b height width out"]:
        """Predict the noise and, with `learn_sigma`, the interpolation of the variance, in float32.

        Args:
            x: noisy images of any size that `patch_size` divides.
            t: timesteps in 0…1000.
            y: labels; the null class has the index num_classes, and `y=None` selects it for all images.
            drop: True replaces an image's label with the null class.
        """
        stack, c, grid = self._run_blocks(x, t, y, drop, ())
        return self._image(self.final, stack.output, c, grid)

    def outputs(
        self,
        x: Float[Array, "b height width c"],
        t: Float[Array, " b"] | Int[Array, " b"],
        y: Int[Array, " b"] | None = None,
        *,
        drop: Bool[Array, " b"] | None = None,
        taps: Collection[int] = (),
        features: StackFeatures | Literal["keep"] | None = None,
    ) -> Outputs:
        """Also return the internal head's prediction, and the tokens after each block in `taps`.

        The internal head predicts what the model predicts, from the tokens of an earlier block (Internal
        Guidance, CVPR 2026). `features` are those of `BlockStack.run`.

        Raises:
            ValueError: a tap is not the index of a block.
        """
        head = self.options.internal_head
        tapped = {*taps} if head is None else {*taps, head}
        stack, c, grid = self._run_blocks(x, t, y, drop, tapped, features)
        internal = None
        if head is not None and self.internal is not None:
            internal = self._image(self.internal, stack.hidden[head], c, grid)
        output = self._image(self.final, stack.output, c, grid)
        return Outputs(output, internal, {block: stack.hidden[block] for block in taps}, stack.features)

    def _run_blocks(
        self,
        x: Array,
        t: Array,
        y: Array | None,
        drop: Array | None,
        taps: Collection[int],
        features: StackFeatures | Literal["keep"] | None = None,
    ) -> tuple[StackOutputs, Array, tuple[int, int]]:
        """Return what the blocks compute, the condition and the grid."""
        height, width = x.shape[1:3]
        self.options.check_size(height, width)
        grid = (height // self.patch_size, width // self.patch_size)
        if grid[0] % context_size():
            raise ValueError(
                f"invalid input height {height}: got {grid[0]} rows of tokens; expected a multiple of the"
                f" {context_size()} devices of mesh axis context"
            )
        c = self.time_embed(t)
        if self.label_embed is not None:
            c = c + self.label_embed(y, drop, x.shape[0])
        c = constrain_batch(c)
        tokens = self.patch_embed(patchify(constrain_rows(x), self.patch_size))
        tokens = tokens + jnp.asarray(sincos_positions(grid, self.hidden_size), tokens.dtype)
        return self.blocks.run(tokens, c, grid, taps, features), c, grid

    def _image(self, final: FinalLayer, tokens: Array, c: Array, grid: tuple[int, int]) -> Array:
        """Return the prediction of a final layer, in float32."""
        return unpatchify(final(tokens, c).astype(jnp.float32), grid, self.patch_size)
