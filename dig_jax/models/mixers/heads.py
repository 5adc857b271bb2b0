"""Attention heads over the device mesh."""

from jaxtyping import Array, Float

from dig_jax.parallel import axis_sizes, constrain_heads


def split_heads(x: Float[Array, "b t d"], num_heads: int) -> Float[Array, "b t h k"]:
    """Split channels into heads, sharded over the mesh axis `tensor`.

    Raises:
        ValueError: the size of the mesh axis does not divide num_heads.
    """
    devices = axis_sizes().get("tensor", 1)
    if num_heads % devices:
        raise ValueError(
            f"invalid num_heads={num_heads}; expected a multiple of the {devices} devices of mesh axis tensor"
        )
    return constrain_heads(x.reshape(*x.shape[:2], num_heads, -1))
