"""Encoder and decoder, and their sizes."""

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
    """Sizes with diffusers' names; the defaults are Stable Diffusion's (83,653,863 parameters).

    block_out_channels: channels at each resolution; each resolution is half the previous one.
    layers_per_block: residual blocks per resolution in the encoder; the decoder has one more.
    norm_num_groups: groups of channels in every group norm.
    scaling_factor: factor from the posterior to latents, which gives them a standard deviation of about 1.

    Raises:
        ValueError: invalid sizes.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self):
        # The upper limits reject files that describe a network too large to build.
        limits = {"in_channels": 64, "out_channels": 64, "latent_channels": 256, "layers_per_block": 16}
        for name, limit in limits.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"invalid {name}={getattr(self, name)}; expected 1 to {limit}")
        widths, groups = self.block_out_channels, self.norm_num_groups
        fitting = groups >= 1 and all(0 < width <= 2**16 and width % groups == 0 for width in widths)
        if not (fitting and 1 <= len(widths) <= 8):
            raise ValueError(
                f"invalid block_out_channels={list(widths)[:9]}; expected one to eight multiples of"
                f" norm_num_groups={groups}"
            )
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(
                f"invalid scaling_factor={self.scaling_factor}; expected a positive finite number"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent pixel along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Stage(nnx.Module):
    """The residual blocks of one resolution, and the resampling to the next."""

    def __init__(self, blocks: Sequence[ResnetBlock], resample: Downsample | Upsample | None):
        self.resnets, self.resample = nnx.List(blocks), resample

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height_out width_out c_out"]:
        """Apply the blocks, then the resampling if there is one."""
        for block in self.resnets:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the resolution of the latents."""

    def __init__(self, channels: int, **options):
        self.resnets = nnx.List([ResnetBlock(channels, channels, **options) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, **options)])

    def __call__(self, x: Float[Array, "n height width c"]) -> Float[Array, "n height width c"]:
        """Apply the three layers."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nnx.Module):
    """The network from images to the posterior's moments, before the last 1×1 convolution."""

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
        """Return two values per latent channel."""
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """The network from latents, after the first 1×1 convolution, to images."""

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
        """Decode the full image at once; `decode_in_stripes` needs less memory."""
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
