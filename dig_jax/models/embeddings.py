"""Embeddings of patches, positions, timesteps and labels (DiT, Peebles & Xie 2023, section 3.2)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from dig_jax.models.layers import Linear, xavier

normal_002 = nnx.initializers.normal(0.02)


def patchify(x: Float[Array, "b height width c"], patch_size: int) -> Float[Array, "b t patch"]:
    """Cut images into tokens in raster order, each in (row, column, channel) order."""
    b, height, width, c = x.shape
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(b, rows, patch_size, columns, patch_size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * columns, patch_size * patch_size * c)


def unpatchify(
    x: Float[Array, "b t patch"], grid: tuple[int, int], patch_size: int
) -> Float[Array, "b height width c"]:
    """Invert `patchify` for a grid of (rows, columns) tokens."""
    b, _, size = x.shape
    rows, columns = grid
    c = size // patch_size**2
    x = x.reshape(b, rows, columns, patch_size, patch_size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * patch_size, columns * patch_size, c)


def sincos_positions(
    grid: tuple[int, int], width: int, span: tuple[int, int] | None = None
) -> Float[np.ndarray, "t d"]:
    """Return fixed 2-D positions: the first half of the width encodes the column, the second the row.

    Each half is [sin, cos] of the coordinate times 10000^(-i / (width/4)), as in MAE (He et al. 2022).

    Args:
        grid: (rows, columns).
        width: channels of a token.
        span: (rows, columns) over which the coordinates of the grid are spread; by default the grid's own.
    """
    # A token covers an interval, whose center is its coordinate.
    spread = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(grid, span or grid, strict=True)]
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(*spread, indexing="ij")
    angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in (column, row)]
    halves = [np.concatenate([np.sin(a), np.cos(a)], axis=1) for a in angles]
    return np.concatenate(halves, axis=1).astype(np.float32)


def timestep_features(t: Float[Array, "*b"] | Int[Array, "*b"], size: int = 256) -> Float[Array, "*b f"]:
    """Return [cos, sin] of t·10000^(-i / (size/2)) in float32, for t in 0…1000."""
    half = size // 2
    frequencies = jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear of 256 timestep features, always in float32 (one row per image)."""

    frequencies = 256

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        options = {"kernel_init": normal_002, "rngs": rngs}
        self.hidden = Linear(self.frequencies, width, **options)
        self.out = Linear(width, width, **options)

    def __call__(self, t: Float[Array, "*b"] | Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """Embed timesteps in 0…1000."""
        return self.out(jax.nn.silu(self.hidden(timestep_features(t, self.frequencies))))


class LabelEmbedding(nnx.Module):
    """A table with one row per class and one for the null class of guidance, at index `num_classes`."""

    def __init__(self, num_classes: int, width: int, *, rngs: nnx.Rngs):
        self.num_classes = num_classes
        self.table = nnx.Embed(num_classes + 1, width, embedding_init=normal_002, rngs=rngs)

    def __call__(
        self, y: Int[Array, "*b"] | None, drop: Bool[Array, "*b"] | None, t: Num[Array, "*b"]
    ) -> Float[Array, "*b d"]:
        """Embed labels of as many images as `t` has; `y=None` and `drop=True` select the null class."""
        null = jnp.full_like(t, self.num_classes, jnp.int32)
        y = null if y is None else y
        return self.table(y if drop is None else jnp.where(drop, null, y))


class JumpEmbedding(nnx.Module):
    """Linear, SiLU, Linear of the features of a jump: its length and its guidance, four numbers in 0…1.

    The numbers are the length t - r of the step, 1 - 1/w for the scale w of guidance, and the interval of
    times with guidance (improved MeanFlow, Geng et al. 2025). The last map starts at zero: all steps from t
    start with the velocity at t.
    """

    range = 10
    """The features are those of numbers in 0…10, because training takes the derivative by the length."""

    none = (0.0, 0.0, 0.0, 1.0)
    """No step, scale 1, guidance at all times."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        size = len(self.none) * TimestepEmbedding.frequencies
        self.hidden = Linear(size, width, kernel_init=normal_002, rngs=rngs)
        self.out = Linear(width, width, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, jump: Float[Array, "*b 4"] | None, t: Num[Array, "*b"]) -> Float[Array, "*b d"]:
        """Embed the jumps of as many images as `t` has; None is no jump and no guidance."""
        if jump is None:
            jump = jnp.broadcast_to(jnp.float32(self.none), (*t.shape, len(self.none)))
        features = timestep_features(self.range * jump, TimestepEmbedding.frequencies)
        return self.out(jax.nn.silu(self.hidden(features.reshape(*t.shape, -1))))


class BottleneckEmbedding(nnx.Module):
    """Two linear maps from a patch to its token through a few channels (Li & He 2025, JiT)."""

    def __init__(self, patch: int, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.reduce = Linear(patch, channels, use_bias=False, **options)
        self.expand = Linear(channels, width, **options)

    def __call__(self, x: Float[Array, "b t patch"]) -> Float[Array, "b t d"]:
        """Embed each patch."""
        return self.expand(self.reduce(x))


class ClassTokens(nnx.Module):
    """Tokens that hold the label's embedding: in-context conditioning (DiT, section 3.2; Li & He 2025, JiT).

    Each token adds a learned position to the embedding.
    """

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.positions = nnx.Param(normal_002(rngs.params(), (count, width)))

    def __call__(self, label: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        """Return the tokens of each image for its label's embedding."""
        return label[:, None] + self.positions[...]
