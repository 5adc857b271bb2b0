"""The transformer block of all models and the final layer (DiG, section 3.3; DiT, section 3.2)."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.models.layers import DepthwiseConv, Linear, Modulation, Norm, NormKind, modulate
from dig_jax.models.packing import Grid, per_token
from dig_jax.parallel import constrain_tokens, context_size

ConvPlacement = Literal["after", "inside"]
Features = tuple[Array, Array]
"""What a block adds to its tokens [b, t, d] before the gates: the outputs of the mixer and of the MLP."""


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Static description of a block.

    Args:
        mixer: (width, dtype=, rngs=) → a token mixer, which is called with (x, grid).
        mlp: (width, dtype=, rngs=) → an MLP, which is called with x.
        mlp_parts: parts of the tokens that the MLP transforms one after the other.
        conv: "after" puts the depthwise convolution at the end of the block with no residual around it;
            "inside" puts it between modulate and the mixer; None omits it.
    """

    mixer: Callable[..., Callable[[Array, Grid], Array]]
    mlp: Callable[..., Callable[[Array], Array]]
    mlp_parts: int = 1
    conv: ConvPlacement | None = None
    norm: NormKind = "layer"


class Block(nnx.Module):
    """x += gate₁·mixer(modulate(norm(x))); x += gate₂·mlp(modulate(norm(x))); then the convolution."""

    def __init__(self, spec: BlockSpec, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.mixer = spec.mixer(width, dtype=dtype, rngs=rngs)
        self.mlp = spec.mlp(width, dtype=dtype, rngs=rngs)
        self.mlp_parts = spec.mlp_parts
        self.norm1, self.norm2 = Norm(width, spec.norm), Norm(width, spec.norm)
        self.modulation = Modulation(width, 6, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(width, dtype=dtype) if spec.conv else None
        self.conv_inside = spec.conv == "inside"

    def __call__(
        self, x: Float[Array, "b t d"], c: Float[Array, "b *n d"], grid: Grid
    ) -> Float[Array, "b t d"]:
        """Transform tokens x, in raster order on a grid, under the condition c of each image."""
        return self.run(x, c, grid)[0]

    def run(
        self,
        x: Float[Array, "b t d"],
        c: Float[Array, "b *n d"],
        grid: Grid,
        features: Features | None = None,
        kept: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Features]:
        """Also return the outputs of the mixer and the MLP, or take given ones in their place.

        `kept` is a factor of both, which stochastic depth sets to 0 for the images that drop the block.
        """
        x = constrain_tokens(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_token(v, grid) for v in self.modulation(c))
        if kept is not None:
            gate1, gate2 = (gate * kept.astype(gate.dtype)[:, None, None] for gate in (gate1, gate2))
        if features is None:
            y = modulate(self.norm1(x), shift1, scale1)
            if self.conv is not None and self.conv_inside:
                y = self.conv(y, grid)
            mixed = constrain_tokens(self.mixer(y, grid))
        else:
            mixed = features[0]
        x = x + gate1 * mixed
        if features is None:
            transformed = self._run_mlp(x, shift2, scale2)
        else:
            transformed = features[1]
        x = x + gate2 * transformed
        if self.conv is not None and not self.conv_inside:
            x = self.conv(x, grid)
        return x, (mixed, transformed)

    def _run_mlp(
        self, x: Float[Array, "b t d"], shift: Float[Array, " b #t d"], scale: Float[Array, " b #t d"]
    ) -> Float[Array, "b t d"]:
        """Return the output of the MLP, in parts of the tokens unless devices share them."""
        if self.mlp_parts == 1 or context_size() > 1:
            return constrain_tokens(self.mlp(modulate(self.norm2(x), shift, scale)))

        def parts_of(x: Float[Array, " b #t d"]) -> list[Float[Array, "b part d"]]:
            return [x] * self.mlp_parts if x.shape[1] == 1 else jnp.array_split(x, self.mlp_parts, axis=1)

        parts = zip(*map(parts_of, (x, shift, scale)), strict=True)
        outputs = [self.mlp(modulate(self.norm2(x), *condition)) for x, *condition in parts]
        return constrain_tokens(jnp.concatenate(outputs, axis=1))


class FinalLayer(nnx.Module):
    """Norm, optional modulation by c, and a linear map to pixels of each patch, initialized to zero."""

    def __init__(
        self,
        width: int,
        out_size: int,
        *,
        modulated: bool,
        norm: NormKind = "layer",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm = Norm(width, norm)
        self.modulation = Modulation(width, 2, dtype=dtype, rngs=rngs) if modulated else None
        zeros = nnx.initializers.zeros_init()
        self.linear = Linear(width, out_size, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Float[Array, "b t patch"]:
        """Return each token's patch in (row, column, channel) order."""
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *(vector[:, None] for vector in self.modulation(c)))
        return self.linear(x)
