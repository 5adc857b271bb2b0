"""What DiG and DiT have in common: embeddings, a stack of blocks, the final layer (DiT, figure 3)."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dig_jax.models.block_stack import BlockStack
from dig_jax.models.blocks import Block, FinalLayer
from dig_jax.models.embeddings import (
    LabelEmbedding,
    TimestepEmbedding,
    patchify,
    sincos_positions,
    unpatchify,
)
from dig_jax.models.layers import Linear, xavier
from dig_jax.parallel import constrain_batch, constrain_rows, context_size


class DiffusionTransformer(nnx.Module):
    """A denoiser of images [B, height, width, C]; DiG and DiT differ in the blocks that they pass.

    Args:
        make_block: (index modulo period, rngs) → Block.
        input_size: (height, width) in pixels or latent pixels, multiples of patch_size.
        num_classes: 0 for an unconditional model, without label table and without modulation of the
            final layer.
        learn_sigma: whether 2·C channels come out, the noise and the variance's interpolation.
        stack: options of `BlockStack`.
    """

    def __init__(
        self,
        make_block: Callable[[int, nnx.Rngs], Block],
        *,
        input_size: tuple[int, int],
        num_classes: int,
        patch_size: int,
        in_channels: int,
        learn_sigma: bool,
        hidden_size: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        **stack,
    ):
        for name, size in zip(("height", "width"), input_size, strict=True):
            if size < 1 or size % patch_size:
                raise ValueError(f"input {name} {size} is not a multiple of patch_size={patch_size}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of 4, as positions need it")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is negative; 0 makes an unconditional model")
        self.input_size, self.patch_size = input_size, patch_size
        self.num_classes, self.in_channels, self.learn_sigma = num_classes, in_channels, learn_sigma
        self.hidden_size, self.dtype = hidden_size, dtype
        out_size = patch_size**2 * in_channels * (2 if learn_sigma else 1)
        self.patch_embed = Linear(
            patch_size**2 * in_channels, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs
        )
        self.time_embed = TimestepEmbedding(hidden_size, rngs=rngs)
        self.label_embed = LabelEmbedding(num_classes, hidden_size, rngs=rngs) if num_classes else None
        self.blocks = BlockStack(make_block, width=hidden_size, dtype=dtype, rngs=rngs, **stack)
        self.final = FinalLayer(hidden_size, out_size, modulated=num_classes > 0, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b height width c"],
        t: Float[Array, " b"] | Int[Array, " b"],
        y: Int[Array, " b"] | None = None,
        *,
        drop: Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b height width out"]:
        """Predicts the noise, and the variance's interpolation when `learn_sigma`, in float32.

        Args:
            x: noisy images; any size that the patch divides, not only the one of training.
            t: timesteps in 0…1000.
            y: labels; the index num_classes is the null class, and so is `y=None`.
            drop: True replaces that image's label by the null class.
        """
        height, width = x.shape[1:3]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"an image of {height}×{width} is not divided by patch_size={self.patch_size}")
        grid = (height // self.patch_size, width // self.patch_size)
        if grid[0] % context_size():
            raise ValueError(
                f"{grid[0]} rows of tokens do not divide by the {context_size()} devices of mesh axis context"
            )
        c = self.time_embed(t)
        if self.label_embed is not None:
            c = c + self.label_embed(y, drop, x.shape[0])
        c = constrain_batch(c)
        tokens = self.patch_embed(patchify(constrain_rows(x), self.patch_size))
        tokens = tokens + jnp.asarray(sincos_positions(grid, self.hidden_size), tokens.dtype)
        tokens = self.final(self.blocks(tokens, c, grid), c)
        return unpatchify(tokens.astype(jnp.float32), grid, self.patch_size)
