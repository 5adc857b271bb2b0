"""The selective scan as Pallas kernels for TPUs.

A grid step runs one chunk of tokens for one block of channels. The state [N, channels] stays in registers and
in VMEM, with the channels in lanes, so a token's row of x broadcasts over the states. The maps B and C come
transposed, [N, tokens], so that a token's column broadcasts over the channels. The backward kernel first
computes a chunk's states again, into VMEM.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_gla.selective_scan.scan import ROWS, Operands, Options, chunk_size, num_chunks

_LANES = 128
_FORWARD_CHANNELS, _BACKWARD_CHANNELS = 256, 128  # the most in a block, without spilled registers


def unsupported(operands: Operands, options: Options) -> str | None:
    """Return why the kernels do not support a scan, or None if they do."""
    del options
    states = operands.a.shape[0]
    if states % ROWS or states > _LANES:
        return f"got N={states}; expected a multiple of {ROWS}, at most {_LANES}"
    return None


def forward(
    operands: Operands, options: Options
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b m n d"]]:
    """Return the output, the final state, and the state that enters each chunk in the scan's direction."""
    launch = _Launch.of(operands, options, _FORWARD_CHANNELS, last_first=options.reverse)
    arrays = launch.arrays(operands)
    results = {
        "y": ("tokens", operands.x.dtype),
        "final_state": ("state", jnp.float32),
        "states": ("states", jnp.float32),
    }
    scratch = [launch.state_shape, (launch.chunk, launch.width)]
    found = launch.run("selective_scan_forward", _forward_kernel, arrays, results, scratch)
    return found["y"], found["final_state"], found["states"]


def backward(
    operands: Operands,
    states: Float[Array, "b m n d"],
    d_y: Float[Array, "b t d"],
    d_final_state: Float[Array, "b n d"],
    options: Options,
) -> Operands:
    """Return the gradients of the operands, from the states that `forward` saved."""
    launch = _Launch.of(operands, options, _BACKWARD_CHANNELS, last_first=not options.reverse)
    arrays = launch.arrays(operands) | {"states": states, "d_y": d_y, "d_final_state": d_final_state}
    del arrays["initial_state"]
    results = {
        "d_x": ("tokens", operands.x.dtype),
        "d_dt": ("tokens", operands.dt.dtype),
        "d_b": ("map_parts", jnp.float32),
        "d_c": ("map_parts", jnp.float32),
        "d_a": ("state", jnp.float32),
        "d_d": ("row", jnp.float32),
        "d_state": ("state", jnp.float32),
    }
    if operands.z is not None:
        results["d_z"] = ("tokens", operands.z.dtype)
    tokens = (launch.chunk, launch.width)
    scratch = [launch.state_shape, (launch.chunk, *launch.state_shape), tokens, tokens]
    found = launch.run("selective_scan_backward", _backward_kernel, arrays, results, scratch)

    def tokens_last(parts: Array, like: Array) -> Array:
        return parts.sum(1)[:, :, : like.shape[1]].swapaxes(1, 2).astype(like.dtype)

    return Operands(
        found["d_x"],
        found["d_dt"],
        found["d_a"].sum(0),
        tokens_last(found["d_b"], operands.b),
        tokens_last(found["d_c"], operands.c),
        found["d_d"].sum((0, 1)),
        found.get("d_z"),
        found["d_state"],
    )


# What each array is.
_FORM = {
    **dict.fromkeys(("x", "dt", "z", "d_y"), "tokens"),
    **dict.fromkeys(("b", "c"), "maps"),
    **dict.fromkeys(("initial_state", "d_final_state"), "state"),
    "states": "states",
    "a": "rates",
    "d": "weight",
}


@dataclasses.dataclass(frozen=True)
class _Launch:
    """Shapes and block sizes of a kernel call.

    Args:
        shape: B, T, channels and N.
        width: channels in a block.
        last_first: whether the grid visits the last chunk first.
    """

    shape: tuple[int, int, int, int]
    width: int
    reverse: bool
    last_first: bool
    interpret: bool

    @classmethod
    def of(cls, operands: Operands, options: Options, most_channels: int, *, last_first: bool) -> "_Launch":
        """Return the launch of a scan, with blocks of at most so many channels."""
        batch, tokens, channels = operands.x.shape
        blocks = -(-channels // most_channels)
        width = _LANES * -(-channels // (blocks * _LANES))
        shape = (batch, tokens, channels, operands.a.shape[0])
        return cls(shape, width, options.reverse, last_first, options.interpret)

    @property
    def chunk(self) -> int:
        """Number of tokens in a grid step."""
        return chunk_size(self.shape[1])

    @property
    def blocks(self) -> int:
        """Number of blocks of channels."""
        return -(-self.shape[2] // self.width)

    @property
    def state_shape(self) -> tuple[int, int]:
        """Shape of a block's state."""
        return self.shape[3], self.width

    @property
    def map_lanes(self) -> int:
        """Number of tokens of the transposed maps, with padding."""
        return _LANES * -(-self.shape[1] // _LANES)

    def arrays(self, operands: Operands) -> dict[str, Array]:
        """Return the operands in the kernels' layouts."""
        found = {name: x for name, x in operands._asdict().items() if x is not None}
        for name in ("b", "c"):
            padding = ((0, 0), (0, 0), (0, self.map_lanes - self.shape[1]))
            found[name] = jnp.pad(found[name].astype(jnp.float32).swapaxes(1, 2), padding)
        return found | {"d": operands.d[None]}

    def run(
        self,
        name: str,
        kernel: Callable[..., None],
        arrays: dict[str, Array],
        results: dict[str, tuple[str, Any]],
        scratch: Sequence[tuple[int, ...]],
    ) -> dict[str, Array]:
        """Call a kernel, a function of this launch, refs by name and the scratch refs."""
        batch, tokens, channels, states = self.shape
        local = jax.sharding.ManualAxisType(varying=frozenset())
        shapes = {
            "tokens": (batch, tokens, channels),
            "state": (batch, states, channels),
            "states": (batch, num_chunks(tokens), states, channels),
            "row": (batch, 1, channels),
            "map_parts": (batch, self.blocks, states, self.map_lanes),
        }
        outputs = {
            key: jax.ShapeDtypeStruct(shapes[form], dtype, manual_axis_type=local)
            for key, (form, dtype) in results.items()
        }
        forms = {key: _FORM[key] for key in arrays} | {key: form for key, (form, _) in results.items()}

        def body(*refs: Any) -> None:
            kernel(self, dict(zip(forms, refs, strict=False)), *refs[len(forms) :])

        moved = [*arrays.values(), *outputs.values()]
        steps = 3 if "d_y" in arrays else 1
        cost = pl.CostEstimate(
            flops=steps * 6 * math.prod(self.shape),
            transcendentals=math.prod(self.shape) * min(steps, 2),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        )
        call = pl.pallas_call(
            body,
            grid=(batch, self.blocks, num_chunks(tokens)),
            in_specs=[self._spec(forms[key]) for key in arrays],
            out_specs=[self._spec(forms[key]) for key in outputs],
            out_shape=list(outputs.values()),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=cost,
            interpret=self.interpret,
            name=name,
        )
        return dict(zip(outputs, call(*arrays.values()), strict=True))

    def index(self, step: Any) -> Any:
        """Return the index of the chunk of a grid step."""
        return num_chunks(self.shape[1]) - 1 - step if self.last_first else step

    def _spec(self, form: str) -> pl.BlockSpec:
        states, width = self.state_shape
        index = self.index

        def map_block(step: Any) -> Any:
            return jax.lax.div(index(step) * self.chunk, jnp.int32(_LANES))

        return {
            "tokens": pl.BlockSpec((None, self.chunk, width), lambda b, j, i: (b, index(i), j)),
            "maps": pl.BlockSpec((None, states, _LANES), lambda b, j, i: (b, 0, map_block(i))),
            "map_parts": pl.BlockSpec((None, None, states, _LANES), lambda b, j, i: (b, j, 0, map_block(i))),
            "state": pl.BlockSpec((None, states, width), lambda b, j, i: (b, 0, j)),
            "states": pl.BlockSpec((None, None, states, width), lambda b, j, i: (b, index(i), 0, j)),
            "rates": pl.BlockSpec((states, width), lambda b, j, i: (0, j)),
            "weight": pl.BlockSpec((1, width), lambda b, j, i: (0, j)),
            "row": pl.BlockSpec((None, 1, width), lambda b, j, i: (b, 0, j)),
        }[form]


class _Chunk:
    """The tokens of a grid step: rows of eight tokens, zero outside the array."""

    def __init__(self, launch: _Launch, refs: dict[str, Any]):
        self.launch, self.refs = launch, refs
        self.step = pl.program_id(2)
        start = launch.index(self.step) * launch.chunk
        self.tokens = launch.shape[1] - start
        self.lane = jax.lax.rem(start, jnp.int32(_LANES))
        self.channels = launch.shape[2] - pl.program_id(1) * launch.width

    def inside(self, x: Array) -> Array:
        """Replace channels outside the array, which a partial block leaves undefined, by zero."""
        if self.launch.shape[2] % self.launch.width == 0:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        return jnp.where(lane < self.channels, x, 0)

    def array(self, name: str) -> Array:
        """Return a whole block: a state, the rates or the weight."""
        return self.inside(self.refs[name][...])

    def all(self, name: str) -> Array:
        """Return all tokens of the chunk, [tokens, channels] in float32."""
        return self.rows(name, 0, self.launch.chunk)

    def rows(self, name: str, base: Any, count: int = ROWS) -> Array:
        """Return the tokens from `base` on, [count, channels] in float32."""
        x = self.refs[name][pl.ds(base, count), :].astype(jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return self.inside(jnp.where(row < self.tokens - base, x, 0))

    def maps(self, name: str, base: Any) -> Array:
        """Return a map of eight tokens in its first lanes, [N, 128]."""
        return pltpu.roll(self.refs[name][...], _LANES - self.lane - base, 1)

    def loop(self, reverse: bool, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Run `body(base, carry)` for each group of eight tokens, in the order of a scan."""
        groups = jax.lax.div(jnp.minimum(self.tokens, self.launch.chunk) + (ROWS - 1), jnp.int32(ROWS))

        def step(i: Any, carry: Any) -> Any:
            group = groups - 1 - i if reverse else i
            return body(pl.multiple_of(group * ROWS, ROWS), carry)

        return jax.lax.fori_loop(jnp.int32(0), groups, step, carry)


def _order(reverse: bool) -> Sequence[int]:
    return range(ROWS - 1, -1, -1) if reverse else range(ROWS)


def _place(rows: Array, j: int, row: Array) -> Array:
    """Put a row [1, channels] at index j of [8, channels]."""
    index = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return jnp.where(index == j, row, rows)


def _gate(z: Array) -> tuple[Array, Array]:
    """Return SiLU(z) and its derivative."""
    sigmoid = jax.nn.sigmoid(z)
    return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))


def _forward_kernel(launch: _Launch, refs: dict[str, Any], carried: Any, raw: Any) -> None:
    """Run the recurrence over a chunk. raw: the output without D x and without the gate."""
    chunk = _Chunk(launch, refs)

    @pl.when(chunk.step == 0)
    def _():
        carried[...] = chunk.array("initial_state")

    refs["states"][...] = carried[...]

    def group(base: Any, state: Array) -> Array:
        dt = chunk.rows("dt", base)
        b, c = chunk.maps("b", base), chunk.maps("c", base)
        added, y = dt * chunk.rows("x", base), jnp.zeros_like(dt)
        for j in _order(launch.reverse):
            decay = jnp.exp(dt[j : j + 1] * chunk.array("a"))
            state = decay * state + added[j : j + 1] * b[:, j : j + 1]
            y = _place(y, j, jnp.sum(c[:, j : j + 1] * state, axis=0, keepdims=True))
        raw[pl.ds(base, ROWS), :] = y
        return state

    state = chunk.loop(launch.reverse, group, carried[...])
    carried[...] = state
    y = raw[...] + chunk.array("d") * chunk.all("x")
    y = y * _gate(chunk.all("z"))[0] if "z" in refs else y
    refs["y"][...] = y.astype(refs["y"].dtype)

    @pl.when(chunk.step == num_chunks(launch.shape[1]) - 1)
    def _():
        refs["final_state"][...] = state


def _backward_kernel(
    launch: _Launch, refs: dict[str, Any], carried: Any, states: Any, d_out: Any, raw: Any
) -> None:
    """Compute the states of a chunk again, then the gradients in the opposite order.

    carried: the gradient of the state. states: the state before each token. d_out: the gradient of the
    output before the gate. raw: the output without D x and without the gate.
    """
    chunk = _Chunk(launch, refs)

    @pl.when(chunk.step == 0)
    def _():
        carried[...] = chunk.array("d_final_state")
        refs["d_a"][...] = jnp.zeros(launch.state_shape, jnp.float32)
        refs["d_d"][...] = jnp.zeros((1, launch.width), jnp.float32)

    d_y, gated = chunk.all("d_y"), "z" in refs
    d_out[...] = d_y * _gate(chunk.all("z"))[0] if gated else d_y
    d_c = _recompute(chunk, states, d_out, raw)
    if gated:
        y = raw[...] + chunk.array("d") * chunk.all("x")
        refs["d_z"][...] = (chunk.all("d_y") * y * _gate(chunk.all("z"))[1]).astype(refs["d_z"].dtype)
    d = chunk.array("d")
    lane = jax.lax.broadcasted_iota(jnp.int32, (launch.shape[3], _LANES), 1)

    def group(base: Any, carry: tuple) -> tuple:
        d_state, d_d, d_b = carry
        x, dt, d_y = chunk.rows("x", base), chunk.rows("dt", base), d_out[pl.ds(base, ROWS), :]
        b, c = chunk.maps("b", base), chunk.maps("c", base)
        d_x, d_dt = d * d_y, jnp.zeros_like(x)
        for j in _order(not launch.reverse):
            row = slice(j, j + 1)
            d_state = d_state + c[:, row] * d_y[row]
            a = chunk.array("a")
            decay = jnp.exp(dt[row] * a)
            d_exponent = d_state * states[base + j] * decay
            refs["d_a"][...] += d_exponent * dt[row]
            d_added = jnp.sum(d_state * b[:, row], axis=0, keepdims=True)
            through_decay = jnp.sum(d_exponent * a, axis=0, keepdims=True)
            d_dt = _place(d_dt, j, through_decay + d_added * x[row])
            d_x = _place(d_x, j, d_x[row] + d_added * dt[row])
            column = jnp.sum(d_state * (dt[row] * x[row]), axis=1, keepdims=True)
            d_b = jnp.where(lane == chunk.lane + base + j, column, d_b)
            d_state = d_state * decay
        refs["d_x"][pl.ds(base, ROWS), :] = d_x.astype(refs["d_x"].dtype)
        refs["d_dt"][pl.ds(base, ROWS), :] = d_dt.astype(refs["d_dt"].dtype)
        return d_state, d_d + jnp.sum(d_y * x, axis=0, keepdims=True), d_b

    carry = (carried[...], refs["d_d"][...], refs["d_b"][...])
    d_state, refs["d_d"][...], d_b = chunk.loop(not launch.reverse, group, carry)
    carried[...] = d_state
    refs["d_b"][...], refs["d_c"][...] = d_b, d_c
    refs["d_state"][...] = d_state


def _recompute(chunk: _Chunk, states: Any, d_out: Any, raw: Any) -> Array:
    """Fill `states` and `raw`, and return the gradient of C."""
    launch, refs = chunk.launch, chunk.refs
    lane = jax.lax.broadcasted_iota(jnp.int32, (launch.shape[3], _LANES), 1)

    def group(base: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, d_c = carry
        dt, d_y = chunk.rows("dt", base), d_out[pl.ds(base, ROWS), :]
        b, c = chunk.maps("b", base), chunk.maps("c", base)
        added, y = dt * chunk.rows("x", base), jnp.zeros_like(dt)
        for j in _order(launch.reverse):
            states[base + j] = state
            decay = jnp.exp(dt[j : j + 1] * chunk.array("a"))
            state = decay * state + added[j : j + 1] * b[:, j : j + 1]
            y = _place(y, j, jnp.sum(c[:, j : j + 1] * state, axis=0, keepdims=True))
            column = jnp.sum(d_y[j : j + 1] * state, axis=1, keepdims=True)
            d_c = jnp.where(lane == chunk.lane + base + j, column, d_c)
        raw[pl.ds(base, ROWS), :] = y
        return state, d_c

    return chunk.loop(launch.reverse, group, (chunk.array("states"), refs["d_c"][...]))[1]
