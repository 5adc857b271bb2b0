"""Checks of arguments; each error names the argument, what it got and what it accepts."""

import math
import numbers
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_gla.scan import Operands
from pallas_gla.scan_order import DIRECTIONS

FLOATS = ("bfloat16", "float16", "float32")
INTEGERS = ("int32", "int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64")
MIN_CHUNK_SIZE = 16


def check_array(name: str, x: Any, meaning: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Raises ValueError unless `x` is an array of this shape (`meaning` in words) and one of these dtypes."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an array {meaning}, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}, accepted is {meaning} = {shape}")
    if str(x.dtype) not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}, accepted are {', '.join(dict.fromkeys(dtypes))}")


def check_qkvg(q: Any, k: Any, v: Any, g: Any, *, gate_name: str = "g") -> None:
    """Raises ValueError unless the four arrays fit together as `pallas_gla.gla` says."""
    for name, x, meaning in (("q", q, "[B, T, H, K]"), ("v", v, "[B, T, H, V]")):
        shape = getattr(x, "shape", None)
        if not shape or len(shape) != 4 or 0 in shape:
            got = type(x).__name__ if shape is None else f"shape {shape}"
            raise ValueError(f"{name} must be an array {meaning} without an empty axis, got {got}")
    dtype = str(q.dtype)
    check_array("q", q, "[B, T, H, K]", q.shape, FLOATS)
    check_array("k", k, "[B, T, H, K] of q", q.shape, (dtype,))
    check_array("v", v, "[B, T, H, V], B, T, H of q", (*q.shape[:3], v.shape[3]), (dtype,))
    check_array(gate_name, g, "[B, T, H, K] of q", q.shape, (dtype, "float32"))


def check_options(q: Any, v: Any, scale: Any, initial_state: Any, segment_ids: Any, chunk_size: Any) -> None:
    """Raises ValueError for an option that `pallas_gla.gla` does not accept."""
    batch, tokens, heads, width = q.shape
    if scale is not None and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"scale must be a finite Python number or None, got {scale!r}")
    if initial_state is not None:
        shape = (batch, heads, width, v.shape[3])
        check_array("initial_state", initial_state, "[B, H, K, V]", shape, (str(q.dtype), "float32"))
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "[B, T]", (batch, tokens), INTEGERS)
    if chunk_size is not None and not _is_power_of_two(chunk_size, at_least=MIN_CHUNK_SIZE):
        raise ValueError(f"chunk_size must be a power of two >= {MIN_CHUNK_SIZE} or None, got {chunk_size!r}")


def check_grid(grid: Any, direction: Any, tokens: int) -> tuple[int, int]:
    """Returns (rows, columns); raises ValueError unless it holds all tokens and the direction is known."""
    is_pair = isinstance(grid, tuple | list) and len(grid) == 2
    if not is_pair or not all(isinstance(n, numbers.Integral) and n > 0 for n in grid):
        raise ValueError(f"grid must be (rows, columns), two positive integers, got {grid!r}")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid {tuple(grid)} holds {grid[0] * grid[1]} tokens, but q has T = {tokens}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    return int(grid[0]), int(grid[1])


def check_axis(axis_name: Any, grid: tuple[int, int], direction: str) -> None:
    """Raises ValueError unless a scan in this direction can be split over the mesh axis."""
    try:
        shards = jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name must be a mesh axis of the jax.shard_map around this call, got {axis_name!r}"
        ) from None
    if direction.startswith("column") and grid[1] % shards:
        raise ValueError(
            f"grid has {grid[1]} columns, which the {shards} devices of axis_name={axis_name!r} do not"
            f" divide; direction={direction!r} gives each of them whole columns"
        )


def check_positive(name: str, x: Any) -> None:
    """Raises ValueError unless `x` is a finite Python number above zero."""
    if not (isinstance(x, numbers.Real) and 0 < x < math.inf):
        raise ValueError(f"{name} must be a finite Python number > 0, got {x!r}")


def _is_power_of_two(n: Any, *, at_least: int) -> bool:
    return isinstance(n, numbers.Integral) and n >= at_least and n & (n - 1) == 0


def debug_checks_enabled() -> bool:
    """Whether PALLAS_GLA_DEBUG=1 is set; read at trace time under `jax.jit`."""
    return os.environ.get("PALLAS_GLA_DEBUG", "0") == "1"


def check_values(operands: Operands, *, gated: bool) -> None:
    """Raises ValueError if an array is not finite or the decay `g` is positive.

    Concrete arrays are checked at once. Traced ones are checked when the compiled function runs: a host
    callback raises, and JAX reports it as a runtime error that carries the message.
    """
    for name, x in operands._asdict().items():
        if x is None:
            continue
        name = "gate_logits" if gated and name == "g" else name
        bad = {"has non-finite values": ~jnp.isfinite(x).all()}
        if name == "g":
            bad["has positive values; a log decay is <= 0"] = (x > 0).any()
        for problem, found in bad.items():
            message = f"{name} {problem} (checked because PALLAS_GLA_DEBUG=1)"
            if isinstance(found, jax.core.Tracer):
                jax.debug.callback(_raise_if, found, message=message)
            else:
                _raise_if(found, message=message)


def _raise_if(found: Any, *, message: str) -> None:
    if found:
        raise ValueError(message)
