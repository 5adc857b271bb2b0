"""Argument checks. Every error names the argument, the value it got and the values it accepts."""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_gla.scan import Operands
from pallas_gla.scan_order import DIRECTIONS

FLOATS = ("bfloat16", "float16", "float32")
INTEGERS = ("int32", "int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64")
MIN_CHUNK_SIZE = 16


def one_of(choices: tuple[Any, ...]) -> str:
    """Return the choices as text: "a, b or c"."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def check_array(name: str, x: Any, layout: str, shape: tuple[Any, ...], dtypes: tuple[str, ...]) -> None:
    """Raise ValueError unless `x` is an array of this shape (`layout` in words) and one of these dtypes."""
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"invalid {name}: got {type(x).__name__}; expected an array {layout}")
    if x.shape != shape:
        raise ValueError(f"invalid shape of {name}: got {x.shape}; expected {layout} = {shape}")
    if str(x.dtype) not in dtypes:
        accepted = one_of(tuple(dict.fromkeys(dtypes)))
        raise ValueError(f"invalid dtype of {name}: got {x.dtype}; expected {accepted}")


def check_qkvg(q: Any, k: Any, v: Any, g: Any, *, gate_name: str = "g") -> None:
    """Raise ValueError unless shapes and dtypes of the four arrays fit together (see `pallas_gla.gla`)."""
    for name, x, layout in (("q", q, "[B, T, H, K]"), ("v", v, "[B, T, H, V]")):
        shape = getattr(x, "shape", None)
        if not shape or len(shape) != 4 or 0 in shape:
            got = type(x).__name__ if shape is None else f"shape {shape}"
            raise ValueError(f"invalid {name}: got {got}; expected a nonempty array {layout}")
    for name, size in (("T", q.shape[1]), ("K", q.shape[3]), ("V", v.shape[3])):
        if not _is_integer(size):
            raise ValueError(
                f"invalid {name}: got the symbol {size}; expected a number (only B and H may be symbols)"
            )
    dtype = str(q.dtype)
    check_array("q", q, "[B, T, H, K]", q.shape, FLOATS)
    check_array("k", k, "[B, T, H, K]", q.shape, (dtype,))
    check_array("v", v, "[B, T, H, V]", (*q.shape[:3], v.shape[3]), (dtype,))
    check_array(gate_name, g, "[B, T, H, K]", q.shape, (dtype, "float32"))


def check_options(q: Any, v: Any, scale: Any, initial_state: Any, segment_ids: Any, chunk_size: Any) -> None:
    """Raise ValueError for an option that `pallas_gla.gla` does not accept."""
    batch, tokens, heads, width = q.shape
    check_scale(scale, heads)
    if initial_state is not None:
        shape = (batch, heads, width, v.shape[3])
        check_array("initial_state", initial_state, "[B, H, K, V]", shape, (str(q.dtype), "float32"))
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "[B, T]", (batch, tokens), INTEGERS)
    if chunk_size is not None:
        is_power = (
            _is_integer(chunk_size) and chunk_size >= MIN_CHUNK_SIZE and chunk_size & (chunk_size - 1) == 0
        )
        if not is_power:
            expected = f"a power of two >= {MIN_CHUNK_SIZE}, or None"
            raise ValueError(f"invalid chunk_size: got {chunk_size!r}; expected {expected}")


def check_scale(scale: Any, heads: Any) -> None:
    """Raise ValueError unless `scale` is None, a finite number, or an array of one number or one per head."""
    if isinstance(scale, jax.Array | np.ndarray):
        is_real = jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
        if is_real and scale.shape in ((), (heads,)):
            return
        got = f"an array {scale.shape} of {scale.dtype}"
    elif scale is None or (_is_number(scale) and math.isfinite(scale)):
        return
    else:
        got = repr(scale)
    raise ValueError(f"invalid scale: got {got}; expected None, a finite number, or a real array [] or [H]")


def check_grid(grid: Any, direction: Any, tokens: int) -> tuple[int, int]:
    """Return (rows, columns). Raise ValueError for an invalid grid or direction."""
    is_pair = isinstance(grid, tuple | list) and len(grid) == 2
    if not is_pair or not all(_is_integer(n) and n > 0 for n in grid):
        raise ValueError(f"invalid grid: got {grid!r}; expected (rows, columns), two positive integers")
    if grid[0] * grid[1] != tokens:
        raise ValueError(
            f"invalid grid: got {tuple(grid)}, {grid[0] * grid[1]} tokens; expected T = {tokens} tokens"
        )
    if direction not in DIRECTIONS:
        raise ValueError(f"invalid direction: got {direction!r}; expected {one_of(DIRECTIONS)}")
    return int(grid[0]), int(grid[1])


def check_axis(axis_name: Any, grid: tuple[int, int], direction: str) -> None:
    """Raise ValueError unless the mesh axis can shard a scan in this direction."""
    try:
        shards = jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"invalid axis_name: got {axis_name!r}; expected a mesh axis of the enclosing jax.shard_map"
        ) from None
    if direction.startswith("column") and grid[1] % shards:
        raise ValueError(
            f"invalid grid for direction={direction!r} with axis_name={axis_name!r}: got {grid[1]} columns;"
            f" expected a multiple of the axis size, {shards}"
        )


def check_positive(name: str, x: Any) -> None:
    """Raise ValueError unless `x` is a finite Python number above zero."""
    if not (_is_number(x) and 0 < x < math.inf):
        raise ValueError(f"invalid {name}: got {x!r}; expected a finite Python number > 0")


def _is_integer(x: Any) -> bool:
    return isinstance(x, int | np.integer)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.integer | np.floating)


def debug_checks_enabled() -> bool:
    """Return whether PALLAS_GLA_DEBUG=1 is set. Under `jax.jit` this is read at trace time."""
    return os.environ.get("PALLAS_GLA_DEBUG", "0") == "1"


def check_values(operands: Operands, *, gated: bool) -> None:
    """Raise ValueError if an array is not finite or the decay `g` is positive.

    Concrete arrays are checked immediately. Traced arrays are checked when the compiled function runs: a host
    callback raises, and JAX reports a runtime error with the same message.
    """
    for name, x in operands._asdict().items():
        if x is None:
            continue
        name = "gate_logits" if gated and name == "g" else name
        bad: dict[str, Any] = {"has non-finite values": ~jnp.isfinite(x).all()}
        if name == "g":
            bad["has positive values; expected a log decay <= 0"] = (x > 0).any()
        for problem, found in bad.items():
            message = f"{name} {problem} (checked because PALLAS_GLA_DEBUG=1)"
            if isinstance(found, Tracer):
                jax.debug.callback(_raise_if, found, message=message)
            else:
                _raise_if(found, message=message)


def _raise_if(found: Any, *, message: str) -> None:
    if found:
        raise ValueError(message)
