"""DiG: a diffusion transformer with gated linear attention in four scan directions (Zhu et al. 2025)."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dig_jax.models.backbone import DiffusionTransformer
from dig_jax.models.blocks import Block, SwiGLU
from dig_jax.models.mixers import GatedLinearAttention

# Block i scans in direction i mod 4. Tokens stay in raster order; the kernel takes the direction.
DIRECTIONS = ("row", "row_reversed", "column", "column_reversed")


class DiG(DiffusionTransformer):
    """DiG with the switches of the released code.

    Args:
        directions: 4, 2 (row and row reversed) or 1 (row).
        conv: the 3×3 depthwise convolution "after" the block, "inside" it, or None.
        norm: "layer" (no affine) or "rms" (with a weight), in the blocks.
        skip: long skips: None, "linear" or "identity" (it differs only in how it starts).
        skip_alignment: "raster" joins each skip with its own token; "upstream" reproduces the released
            code, where half of the skips arrive with rows and columns exchanged.
        remat: what the backward pass recomputes: None (nothing), "dots" or "full".
        implementation: the kernel of `pallas_gla`; None picks the best.
    """

    def __init__(
        self,
        *,
        input_size: tuple[int, int],
        depth: int,
        hidden_size: int,
        num_heads: int,
        directions: int = 4,
        conv: str | None = "after",
        norm: str = "layer",
        skip: str | None = None,
        skip_alignment: str = "raster",
        remat: str | None = None,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options,
    ):
        self.directions, self.conv, self.norm, self.skip = directions, conv, norm, skip
        self.skip_alignment = skip_alignment
        if skip is not None and (depth < 4 or depth % 2):
            raise ValueError(f"skip={skip!r} needs an even depth of at least 4, got depth={depth}")
        upstream = skip is not None and skip_alignment == "upstream"
        if upstream and (directions != 4 or depth % 4):
            raise ValueError(
                'skip_alignment="upstream" needs directions=4 and a depth that is a multiple of 4, got'
                f" directions={directions}, depth={depth}"
            )
        if upstream and input_size[0] != input_size[1]:
            raise ValueError(f'skip_alignment="upstream" needs square inputs, got {input_size}')

        def make_block(position: int, rngs: nnx.Rngs) -> Block:
            mixer = GatedLinearAttention(
                hidden_size,
                num_heads,
                direction=DIRECTIONS[position % directions],
                dtype=dtype,
                implementation=implementation,
                rngs=rngs,
            )
            mlp = SwiGLU(hidden_size, dtype=dtype, rngs=rngs)
            return Block(hidden_size, mixer=mixer, mlp=mlp, conv=conv, norm=norm, dtype=dtype, rngs=rngs)

        super().__init__(
            make_block,
            input_size=input_size,
            depth=depth,
            period=len(DIRECTIONS),
            hidden_size=hidden_size,
            skip=skip,
            transposed_skips=upstream,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
            **options,
        )
