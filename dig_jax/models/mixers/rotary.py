"""Rotary position embeddings of a grid of tokens (Su et al. 2021; in two dimensions as in EVA-02 and JiT)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_BASE = 10000.0


def rotary_angles(grid: tuple[int, int], size: int) -> Float[np.ndarray, "t half"]:
    """Return the angles of all tokens of a grid in raster order, one for each pair of a head's channels.

    The first half of the pairs turns with the row, the second half with the column, in radians:
    coordinate·10000^(-i / (size/4)) for i = 0 … size/4 - 1.

    Args:
        grid: (rows, columns).
        size: channels of a head, a multiple of 4.
    """
    frequencies = _BASE ** (-np.arange(size // 4) / (size // 4))
    coordinates = np.meshgrid(*map(np.arange, grid), indexing="ij")
    return np.concatenate([x.reshape(-1, 1) * frequencies for x in coordinates], axis=1)


def rotate(x: Float[Array, "b t h k"], grid: tuple[int, int]) -> Float[Array, "b t h k"]:
    """Rotate the pairs (i, i + k/2) of channels by the angles of the grid.

    Tokens that precede the grid are not rotated. The result has the dtype of x.
    """
    angles = rotary_angles(grid, x.shape[-1])
    angles = np.pad(angles, [(x.shape[1] - len(angles), 0), (0, 0)])[:, None].astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
