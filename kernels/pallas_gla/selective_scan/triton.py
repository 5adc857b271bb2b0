"""The selective scan as Pallas kernels for NVIDIA GPUs.

A program scans all tokens for a block of channels and keeps the states in registers. It loads the tokens of a
group before it scans them, so that the loads overlap. The backward kernel walks the chunks backward. For each
it first computes the states before each group of tokens again, into a scratch array that stays in the GPU's
cache, and then the states of one group at a time, in registers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_gla import chip
from pallas_gla.selective_scan.scan import Operands, Options, chunk_size, num_chunks
from pallas_gla.triton import call

_OLDEST_GPU = (8, 0)
_LANES = 32  # channels of a warp
_FORWARD = {"group": 8, "warps": 1}
_BACKWARD = {"group": 2, "warps": 4}
_LOG2_E = math.log2(math.e)


def unsupported(operands: Operands, options: Options) -> str | None:
    """Return why the kernels do not support a scan, or None if they do."""
    if not call.available:
        return f"got jax {jax.__version__}; expected a version with Pallas's Triton backend"
    gpu = chip.current()
    if not options.interpret and gpu.compute_capability is not None and gpu.compute_capability < _OLDEST_GPU:
        return f"got {gpu}; expected sm_80 (Ampere) or later"
    if operands.a.shape[0] != 16:
        return f"got N={operands.a.shape[0]}; expected 16"
    if operands.x.size >= 2**31:
        return f"got B * T * channels = {operands.x.size}; expected less than 2**31"
    return None


def forward(
    operands: Operands, options: Options
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b m n d"]]:
    """Return the output, the final state, and the state that enters each chunk in the scan's direction."""
    launch = _Launch.of(operands, options, **_FORWARD)
    batch, tokens, channels, states = launch.shape
    results = {
        "y": (operands.x.shape, operands.x.dtype),
        "final_state": ((batch, states, channels), jnp.float32),
        "states": ((batch, num_chunks(tokens), states, channels), jnp.float32),
    }
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    found = launch.run("selective_scan_forward", _forward_kernel, arrays, results)
    return found["y"], found["final_state"], found["states"]


def backward(
    operands: Operands,
    states: Float[Array, "b m n d"],
    d_y: Float[Array, "b t d"],
    d_final_state: Float[Array, "b n d"],
    options: Options,
) -> Operands:
    """Return the gradients of the operands, from the states that `forward` saved."""
    launch = _Launch.of(operands, options, **_BACKWARD)
    batch, tokens, channels, size = launch.shape
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    del arrays["initial_state"]
    arrays |= {"states": states, "d_y": d_y, "d_final_state": d_final_state}
    state = ((batch, size, channels), jnp.float32)
    parts = ((launch.blocks, batch, tokens, size), jnp.float32)
    results = {f"d_{name}": (x.shape, x.dtype) for name, x in arrays.items() if name in ("x", "dt", "z")}
    results |= {"d_state": state, "d_a": state, "d_d": ((batch, channels), jnp.float32)}
    results |= {"d_b": parts, "d_c": parts}
    results["scratch"] = ((launch.programs, launch.groups, size, launch.width), jnp.float32)
    found = launch.run("selective_scan_backward", _backward_kernel, arrays, results)
    return Operands(
        found["d_x"],
        found["d_dt"],
        found["d_a"].sum(0),
        found["d_b"].sum(0).astype(operands.b.dtype),
        found["d_c"].sum(0).astype(operands.c.dtype),
        found["d_d"].sum(0),
        found.get("d_z"),
        found["d_state"],
    )


@dataclasses.dataclass(frozen=True)
class _Launch:
    """Shapes and block sizes of a kernel call.

    Args:
        shape: B, T, channels and N.
        group: tokens that are loaded together.
        warps: warps of a program, each with 32 channels.
    """

    shape: tuple[int, int, int, int]
    group: int
    warps: int
    reverse: bool
    interpret: bool

    @classmethod
    def of(cls, operands: Operands, options: Options, group: int, warps: int) -> "_Launch":
        """Return the launch of a scan."""
        batch, tokens, channels = operands.x.shape
        shape = (batch, tokens, channels, operands.a.shape[0])
        return cls(shape, group, warps, options.reverse, options.interpret)

    @property
    def width(self) -> int:
        """Channels of a program."""
        return _LANES * self.warps

    @property
    def blocks(self) -> int:
        """Number of blocks of channels."""
        return -(-self.shape[2] // self.width)

    @property
    def programs(self) -> int:
        """Number of programs."""
        return self.shape[0] * self.blocks

    @property
    def groups(self) -> int:
        """Groups in a chunk."""
        return chunk_size(self.shape[1]) // self.group

    def run(
        self,
        name: str,
        kernel: Callable[..., None],
        arrays: dict[str, Array],
        results: dict[str, tuple[tuple[int, ...], Any]],
    ) -> dict[str, Array]:
        """Call a kernel, a function of a `_Program`; return its results by name."""
        names = (*arrays, *results)

        def body(*refs: Any) -> None:
            kernel(_Program(self, dict(zip(names, refs, strict=True))))

        body.__name__ = name
        moved = [(x.shape, x.dtype) for x in arrays.values()] + list(results.values())
        steps = 3 if "d_y" in arrays else 1
        cost = pl.CostEstimate(
            flops=steps * 6 * math.prod(self.shape),
            transcendentals=steps * math.prod(self.shape),
            bytes_accessed=sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in moved),
        )
        # Rows of channels, states or the like: kernels index their rows.
        flat = [x.reshape(-1, x.shape[-1]) for x in arrays.values()]
        shapes = [((math.prod(shape[:-1]), shape[-1]), dtype) for shape, dtype in results.values()]
        found = call.call(
            body,
            flat,
            shapes,
            programs=self.programs,
            warps=self.warps,
            stages=1,
            cost=cost,
            interpret=self.interpret,
        )
        return {key: x.reshape(shape) for (key, (shape, _)), x in zip(results.items(), found, strict=True)}


class _Program:
    """One program: its block of channels, and loads and stores of its rows."""

    def __init__(self, launch: _Launch, refs: dict[str, Any]):
        self.launch, self.refs = launch, refs
        _, self.tokens, channels, self.size = launch.shape
        self.number = call.program_id(0)
        self.batch = jax.lax.div(self.number, jnp.int32(launch.blocks))
        self.block = jax.lax.rem(self.number, jnp.int32(launch.blocks))
        self.lane = jnp.arange(launch.width, dtype=jnp.int32)
        self.channel = self.block * launch.width + self.lane
        self.inside = self.channel < channels
        self.state_index = jnp.arange(self.size, dtype=jnp.int32)

    def order(self, count: int, *, reverse: bool) -> Callable[[Any], Any]:
        """Return the function that maps the steps of a loop to indices."""
        return (lambda i: count - 1 - i) if reverse else (lambda i: i)

    def load_row(self, name: str, row: Any, valid: Any = True) -> Array:
        """Load a row of channels in float32, zero unless `valid`."""
        row = jnp.broadcast_to(row, self.channel.shape)
        return call.load(self.refs[name], (row, self.channel), self.inside & valid).astype(jnp.float32)

    def store_row(self, name: str, row: Any, x: Array, valid: Any = True) -> None:
        """Store a row of channels."""
        row = jnp.broadcast_to(row, self.channel.shape)
        call.store(self.refs[name], (row, self.channel), x, self.inside & valid)

    def load_map(self, name: str, token: Any, valid: Any) -> Array:
        """Load a token's map, a column of states in float32."""
        row = jnp.broadcast_to(self.batch * self.tokens + token, (self.size,))
        mask = jnp.broadcast_to(valid, (self.size,))
        return call.load(self.refs[name], (row, self.state_index), mask).astype(jnp.float32)[:, None]

    def _matrix(self, first_row: Any) -> tuple[Array, Array, Array]:
        shape = (self.size, self.launch.width)
        rows = jnp.broadcast_to(first_row + self.state_index[:, None], shape)
        channels = jnp.broadcast_to(self.channel[None], shape)
        return rows, channels, jnp.broadcast_to(self.inside[None], shape)

    def load_matrix(self, name: str, first_row: Any) -> Array:
        """Load a matrix of states by channels."""
        *index, mask = self._matrix(first_row)
        return call.load(self.refs[name], tuple(index), mask)

    def store_matrix(self, name: str, first_row: Any, x: Array) -> None:
        """Store a matrix of states by channels."""
        *index, mask = self._matrix(first_row)
        call.store(self.refs[name], tuple(index), x, mask)

    def group(self, chunk: Any, group: Any, names: Sequence[str]) -> list["_Token"]:
        """Load the tokens of a group, in the order of the scan."""
        size, reverse = self.launch.group, self.launch.reverse
        first = chunk * chunk_size(self.tokens) + group * size
        indices = range(size - 1, -1, -1) if reverse else range(size)
        return [_Token(self, first + i, names) for i in indices]


class _Token:
    """A token's rows x, dt, z and d_y, zero outside the sequence, and its maps b and c.

    Maps are loaded where they are used, because each thread needs a map of all states.
    """

    def __init__(self, program: _Program, index: Any, names: Sequence[str]):
        self.index, self.valid = index, index < program.tokens
        self.row = program.batch * program.tokens + index
        names = [name for name in names if name in program.refs]
        self.program = program
        self.values = {name: program.load_row(name, self.row, self.valid) for name in names}

    def __getitem__(self, name: str) -> Array:
        if name in ("b", "c"):
            return self.program.load_map(name, self.index, self.valid)
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def step(self, rates: Array, state: Array) -> Array:
        """Return the state after the token."""
        return jnp.exp2(self["dt"][None] * rates) * state + (self["dt"] * self["x"])[None] * self["b"]


def _forward_kernel(program: _Program) -> None:
    launch, chunks = program.launch, num_chunks(program.tokens)
    rates = program.load_matrix("a", 0) * _LOG2_E
    d = program.load_row("d", 0)
    chunk_index = program.order(chunks, reverse=launch.reverse)
    group_index = program.order(launch.groups, reverse=launch.reverse)

    def run_group(chunk: Any, i: Any, state: Array) -> Array:
        for token in program.group(chunk, group_index(i), ("x", "dt", "z")):
            state = token.step(rates, state)
            y = jnp.sum(token["c"] * state, axis=0) + d * token["x"]
            if "z" in token:
                y = y * token["z"] * _sigmoid(token["z"])
            program.store_row("y", token.row, y, token.valid)
        return state

    def run_chunk(i: Any, state: Array) -> Array:
        chunk = chunk_index(i)
        program.store_matrix("states", (program.batch * chunks + chunk) * program.size, state)
        return _loop(launch.groups, lambda i, state: run_group(chunk, i, state), state)

    first = program.batch * program.size
    state = _loop(chunks, run_chunk, program.load_matrix("initial_state", first))
    program.store_matrix("final_state", first, state)


def _loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Run `body(i, carry)`; i is 32 bits wide under any settings of JAX."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp2(-_LOG2_E * x))


def _backward_kernel(program: _Program) -> None:
    launch, chunks = program.launch, num_chunks(program.tokens)
    chunk_index = program.order(chunks, reverse=not launch.reverse)
    group_index = program.order(launch.groups, reverse=not launch.reverse)
    rates = program.load_matrix("a", 0) * _LOG2_E
    d = program.load_row("d", 0)

    def run_chunk(i: Any, carry: tuple) -> tuple:
        chunk = chunk_index(i)
        _save_groups(program, rates, chunk)
        return _loop(launch.groups, lambda i, carry: run_group(chunk, group_index(i), carry), carry)

    def run_group(chunk: Any, group: Any, carry: tuple) -> tuple:
        d_state, d_a, d_d = carry
        tokens = program.group(chunk, group, ("x", "dt", "z", "d_y"))
        states = [_load_group(program, group)]
        for token in tokens[:-1]:
            states.append(token.step(rates, states[-1]))
        for token, before in reversed(list(zip(tokens, states, strict=True))):
            added, decay = token["dt"] * token["x"], jnp.exp2(token["dt"][None] * rates)
            after = decay * before + added[None] * token["b"]
            d_y = token["d_y"]
            if "z" in token:
                sigmoid = _sigmoid(token["z"])
                y = jnp.sum(token["c"] * after, axis=0) + d * token["x"]
                d_z = d_y * y * sigmoid * (1 + token["z"] * (1 - sigmoid))
                program.store_row("d_z", token.row, d_z, token.valid)
                d_y = d_y * token["z"] * sigmoid
            _store_map(program, "d_c", token, jnp.sum(d_y[None] * after, axis=1))
            d_state = d_state + token["c"] * d_y[None]
            _store_map(program, "d_b", token, jnp.sum(d_state * added[None], axis=1))
            d_added = jnp.sum(d_state * token["b"], axis=0)
            decayed = d_state * decay
            d_exponent = decayed * before
            d_a = d_a + d_exponent * token["dt"][None]
            d_dt = jnp.sum(d_exponent * rates, axis=0) / _LOG2_E + d_added * token["x"]
            program.store_row("d_dt", token.row, d_dt, token.valid)
            program.store_row("d_x", token.row, d_added * token["dt"] + d * d_y, token.valid)
            d_state, d_d = decayed, d_d + d_y * token["x"]
        return d_state, d_a, d_d

    first = program.batch * program.size
    zeros = jnp.zeros((program.size, launch.width), jnp.float32)
    carry = (program.load_matrix("d_final_state", first), zeros, jnp.zeros(launch.width, jnp.float32))
    d_state, d_a, d_d = _loop(chunks, run_chunk, carry)
    program.store_matrix("d_state", first, d_state)
    program.store_matrix("d_a", first, d_a)
    program.store_row("d_d", program.batch, d_d)


def _save_groups(program: _Program, rates: Array, chunk: Any) -> None:
    """Write the state before each group of a chunk into the scratch array."""
    launch, chunks = program.launch, num_chunks(program.tokens)
    group_index = program.order(launch.groups, reverse=launch.reverse)

    def run_group(i: Any, state: Array) -> Array:
        group = group_index(i)
        call.store(program.refs["scratch"], _scratch(program, group), state, None)
        for token in program.group(chunk, group, ("x", "dt")):
            state = token.step(rates, state)
        return state

    state = program.load_matrix("states", (program.batch * chunks + chunk) * program.size)
    _loop(launch.groups, run_group, state)


def _load_group(program: _Program, group: Any) -> Array:
    return call.load(program.refs["scratch"], _scratch(program, group), None)


def _scratch(program: _Program, group: Any) -> tuple[Array, Array]:
    """Return the index of a group's state. A thread loads what it has stored itself."""
    shape = (program.size, program.launch.width)
    first = (program.number * program.launch.groups + group) * program.size
    return (
        jnp.broadcast_to(first + program.state_index[:, None], shape),
        jnp.broadcast_to(program.lane[None], shape),
    )


def _store_map(program: _Program, name: str, token: _Token, x: Array) -> None:
    """Store this block's part of a map's gradient."""
    batch, tokens, *_ = program.launch.shape
    row = (program.block * batch + program.batch) * tokens + token.index
    index = (jnp.broadcast_to(row, x.shape), program.state_index)
    call.store(program.refs[name], index, x, jnp.broadcast_to(token.valid, x.shape))
