"""Context parallelism: tokens in raster order are sharded over the mesh axis `context`, by rows of the image.

XLA's partitioner handles everything except the operations that mix tokens: it can partition neither kernels
nor our own collectives. These run under `shard_map`, on each device's images, rows and heads.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dig_jax.parallel.constraints import Axes, axis_sizes, constrain, fitting
from dig_jax.parallel.mesh import BATCH_AXES

CONTEXT = "context"
_ROWS: Sequence[Axes] = (BATCH_AXES, CONTEXT, None, None)
_HEADS: Sequence[Axes] = (BATCH_AXES, CONTEXT, "tensor", None)
_CHANNELS: Mapping[str, Sequence[Axes]] = {
    "tokens": (BATCH_AXES, None, "tensor"),
    "maps": (BATCH_AXES, None, None),
    "matrix": ("tensor", None),
    "vector": ("tensor",),
}


def context_size() -> int:
    """Return the number of devices that share the tokens of an image."""
    return axis_sizes().get(CONTEXT, 1)


def constrain_rows(x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
    """Shard images over the batch axes, and their rows over `context`."""
    return constrain(x, *_ROWS)


def constrain_tokens(x: Float[Array, "b t d"], channels: Axes = None) -> Float[Array, "b t d"]:
    """Shard tokens over the batch axes and `context`, and their channels over the given axes."""
    return constrain(x, BATCH_AXES, CONTEXT, channels)


def constrain_heads(x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    """Shard tokens over the batch axes and `context`, and heads over `tensor`."""
    return constrain(x, *_HEADS)


def local_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of one device's shard of a grid."""
    return grid[0] // context_size(), grid[1]


def shard_map_rows(
    function: Callable, *arrays: Float[Array, "..."], opaque: bool = False
) -> Float[Array, "b t h v"]:
    """Call a function that mixes tokens on each device's rows.

    Args:
        function: (*arrays, axis_name) → [b, t, h, v]; `axis_name` is the mesh axis over which rows are
            sharded, or None.
        arrays: tokens by heads [b, t, h, …], which are sharded; arrays of other ranks are replicated.
        opaque: the function may call a kernel that does not partition itself.
    """
    axis_name = CONTEXT if context_size() > 1 else None
    function = functools.partial(function, axis_name=axis_name)
    if axis_name is None and not (opaque and axis_sizes()):
        return function(*arrays)
    axes = [_HEADS if x.ndim == 4 else () for x in arrays]
    return _on_shards(function, arrays, axes, _HEADS, check=not opaque)


def shard_map_channels(
    function: Callable, arrays: Sequence[Float[Array, "..."]], kinds: Sequence[str]
) -> Float[Array, "b t d"]:
    """Call a function that mixes tokens, but neither images nor channels, on each device's shard of them.

    Args:
        function: (*arrays) → [b, t, d].
        kinds: what each array is: "tokens" [b, t, d], "maps" [b, t, n], "matrix" [d, n] or "vector" [d].
    """
    sizes = axis_sizes()
    if not sizes:
        return function(*arrays)
    specs = [fitting(x.shape, _CHANNELS[kind], sizes) for x, kind in zip(arrays, kinds, strict=True)]
    out_specs = specs[kinds.index("tokens")]
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)(*arrays)


def convolve_with_halo(
    convolve: Callable[[Array, Array], Array],
    kernel: Float[Array, "3 3 d"],
    x: Float[Array, "b height width d"],
) -> Float[Array, "b height width d"]:
    """Apply a zero-padded 3×3 convolution; devices exchange the rows at their borders."""
    size = context_size()
    if size == 1:
        return convolve(kernel, x)
    down, up = ([(i, i + step) for i in range(size) if 0 <= i + step < size] for step in (1, -1))

    def shard_map_rows(x: Array, kernel: Array) -> Array:
        # At the border of the image ppermute yields zeros, which are the padding.
        above = jax.lax.ppermute(x[:, -1:], CONTEXT, down)
        below = jax.lax.ppermute(x[:, :1], CONTEXT, up)
        return convolve(kernel, jnp.concatenate([above, x, below], axis=1))[:, 1:-1]

    return _on_shards(shard_map_rows, [x, kernel], [_ROWS, ()], _ROWS)


def kernel_platform() -> str | None:
    """Return the platform that kernels are compiled for: "cpu", "gpu" or "tpu".

    With a mesh, it is the platform of its devices. Without one it is the default platform, or None if that
    has several devices: the compiler may partition the program, which kernels do not allow.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    return jax.default_backend() if jax.device_count() == 1 else None


def _on_shards(
    function: Callable,
    arrays: Sequence[Array],
    axes: Sequence[Sequence[Axes]],
    out_axes: Sequence[Axes],
    *,
    check: bool = True,
) -> Array:
    """Call `function` under shard_map; the result is sharded like the first array's shape allows.

    `check` lets JAX check what varies over the mesh, which kernels of JAX do not declare.
    """
    sizes = axis_sizes()
    in_specs = tuple(fitting(x.shape, names, sizes) for x, names in zip(arrays, axes, strict=True))
    out_specs = fitting(arrays[0].shape, out_axes, sizes)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=check)(*arrays)
