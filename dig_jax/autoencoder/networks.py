"""The two halves of the autoencoder, and the sizes that they have."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dig_jax.autoencoder.layers import (
    Attention,
    Conv,
    Downsample,
    GroupNorm,
    ResnetBlock,
    Upsample,
)


@dataclasses.dataclass(frozen=True)
class AutoencoderArchitecture:
    """Sizes, under diffusers' names; the defaults are Stable Diffusion's (83,653,863 parameters).

    block_out_channels: width at each resolution; there is a factor of 2 from one to the next.
    layers_per_block: residual blocks per resolution of the encoder; the decoder has one more.
    norm_num_groups: of channels, in every group norm.
    scaling_factor: latents are the posterior times this, so that their deviation is about 1.

    Raises:
        ValueError: sizes that cannot be.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self):
        # The upper limits keep a file from describing a network without end.
        limits = {"in_channels": 64, "out_channels": 64, "latent_channels": 256, "layers_per_block": 16}
        for name, limit in limits.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}={getattr(self, name)} is not in 1…{limit}")
        widths, groups = self.block_out_channels, self.norm_num_groups
        fitting = groups >= 1 and all(0 < width <= 2**16 and width % groups == 0 for width in widths)
        if not (fitting and 1 <= len(widths) <= 8):
            raise ValueError(
                f"block_out_channels={list(widths)[:9]} must be one to eight multiples of"
                f" norm_num_groups={groups}"
            )
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"scaling_factor={self.scaling_factor} is not positive and finite")

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel, along either side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Stage(nnx.Module):
    """The residual blocks of one resolution, and what leads to the next."""

    def __init__(self, blocks: Sequence[ResnetBlock], resample: Downsample | Upsample | None):
        self.resnets, self.resample = nnx.List(blocks), resample

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height_out width_out c_out"]:
        """Changes height and width where there is a next resolution."""
        for block in self.resnets:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the resolution of the latents."""

    def __init__(self, channels: int, **options):
        self.resnets = nnx.List([ResnetBlock(channels, channels, **options) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, **options)])

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height width c"]:
        """Keeps the shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    """Images to the posterior's parameters, before the last 1×1 convolution."""

    def __init__(self, config: AutoencoderArchitecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths, last = config.block_out_channels, config.block_out_channels[-1]
        conv = functools.partial(Conv, dtype=dtype, rngs=rngs)
        options = {"groups": config.norm_num_groups, "dtype": dtype, "rngs": rngs}
        self.conv_in = conv(config.in_channels, widths[0])
        stages, width = [], widths[0]
        for level, width_out in enumerate(widths):
            ins = (width, *[width_out] * (config.layers_per_block - 1))
            resample = None if level == len(widths) - 1 else Downsample(width_out, dtype=dtype, rngs=rngs)
            stages.append(Stage([ResnetBlock(w, width_out, **options) for w in ins], resample))
            width = width_out
        self.down_blocks, self.mid_block = nnx.List(stages), MidBlock(last, **options)
        self.conv_norm_out = GroupNorm(last, config.norm_num_groups)
        self.conv_out = conv(last, 2 * config.latent_channels)

    def __call__(
        self, x: Float[Array, "n height width c"]
    ) -> Float[Array, "n latent_height latent_width c2"]:
        """Gives two values per latent channel."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents, after the first 1×1 convolution, to images."""

    def __init__(self, config: AutoencoderArchitecture, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = config.block_out_channels[::-1]
        conv = functools.partial(Conv, dtype=dtype, rngs=rngs)
        options = {"groups": config.norm_num_groups, "dtype": dtype, "rngs": rngs}
        self.conv_in, self.mid_block = conv(config.latent_channels, widths[0]), MidBlock(widths[0], **options)
        stages, width = [], widths[0]
        for level, width_out in enumerate(widths):
            ins = (width, *[width_out] * config.layers_per_block)
            resample = None if level == len(widths) - 1 else Upsample(width_out, dtype=dtype, rngs=rngs)
            stages.append(Stage([ResnetBlock(w, width_out, **options) for w in ins], resample))
            width = width_out
        self.up_blocks = nnx.List(stages)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups)
        self.conv_out = conv(widths[-1], config.out_channels)

    def __call__(
        self, x: Float[Array, "n height width c"]
    ) -> Float[Array, "n image_height image_width c_out"]:
        """Decodes the whole image at once; `decode_in_stripes` gives the same in less memory."""
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
