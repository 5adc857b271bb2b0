"""Layout of a scan on a TPU: padding, blocks, the grid, and the kernel call."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_gla.mosaic_tpu import tuning
from pallas_gla.mosaic_tpu.tiles import TpuTiling
from pallas_gla.mosaic_tpu.tokens import LANES, SUBLANES, Columns, Tokens, by_rows, column_chunk
from pallas_gla.scan import STATE_INTERVAL, Operands, Scan
from pallas_gla.scan_order import segment_starts, to_raster_order, to_scan_order

# The log decay of a reset, and a logit without decay.
RESET, NO_DECAY_LOGIT = -1e4, 1e4
# The arrays that a kernel reads and writes, by layout.
FORMS = {
    "keys": ("q", "k", "g"),
    "values": ("v", "out_gate", "o"),
    "state": ("initial_state", "final_state"),
    "states": ("states",),
    "weight": ("norm_weight",),
}
TOKENS = ("keys", "values")
# d_x is a gradient, x_dot a tangent.
FORM = {name: form for form, names in FORMS.items() for x in names for name in (x, f"d_{x}", f"{x}_dot")}


def chip_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which the chip takes an operand."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def starts_of_segments(segment_ids: Int[Array, "b t"], scan: Scan) -> Bool[Array, "b t"]:
    """Return the tokens, in raster order, at which the state is reset."""
    ids = to_scan_order(segment_ids, scan.grid, scan.direction)
    return to_raster_order(segment_starts(ids), scan.grid, scan.direction)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel call: `shape` is the scan's (B, T, H, K, V), the grid is (B, head_blocks, steps).

    `columns` is the number of full image columns in a step. It is 0 for a scan along rows, and for a scan
    along columns that do not fit the tiles, whose tokens are copied into scan order.
    """

    scan: Scan
    shape: tuple[int, int, int, int, int]
    dtype: jnp.dtype
    tiling: TpuTiling
    steps: int
    head_blocks: int
    columns: int

    @classmethod
    def of(cls, operands: Operands, scan: Scan, chunks: int) -> "Launch":
        """Choose padded widths, the chunk size, and the heads and the chunks (at most `chunks`) of a step."""
        batch, tokens, heads, keys = operands.q.shape
        values = operands.v.shape[-1]
        blocks = tuning.blocks()
        key_width = max(32, 1 << (keys - 1).bit_length())
        chunk = min(scan.chunk_size or blocks.chunk, max(16, 1 << (tokens - 1).bit_length()))
        itemsize = chip_dtype(operands.v.dtype).itemsize
        most = blocks.column_tokens * 2 // itemsize
        columns, chunk = _columns(scan, chunk, chunks, most)
        if columns:
            steps = scan.grid[1] // columns
        else:
            steps = -(-tokens // (chunk * chunks))
        head_blocks = -(-heads * key_width * itemsize // (2 * blocks.lanes))
        if head_blocks > 1:
            # Blocks narrower than the array must be multiples of 128 lanes.
            aligned = max(LANES // key_width, 1)
            heads = -(-heads // (head_blocks * aligned)) * aligned
        tiling = TpuTiling(
            heads=heads,
            keys=keys,
            key_width=key_width,
            value_width=max(64, 1 << (values - 1).bit_length()),
            values=values,
            chunk=chunk,
            chunks=-(-tokens // (chunk * steps)),
            reverse=scan.reverse,
            dtype=chip_dtype(operands.v.dtype),
        )
        shape = (batch, tokens, operands.q.shape[2], keys, values)
        return cls(scan, shape, tiling.dtype, tiling, steps, head_blocks, columns)

    @property
    def heads(self) -> int:
        """Number of heads, with padding."""
        return self.tiling.heads * self.head_blocks

    @property
    def rows(self) -> int:
        """Number of tokens in a grid step."""
        return self.tiling.chunk * self.tiling.chunks

    @property
    def reordered(self) -> bool:
        """Whether tokens are copied into column order."""
        return self.scan.by_columns and min(self.scan.grid) > 1 and not self.columns

    @property
    def _order(self) -> tuple[int, ...]:
        """Token axes of an operand: one, or the two of the grid."""
        return self.scan.grid if self.columns else (self.steps * self.rows,)

    def inputs(self, operands: Operands) -> dict[str, Shaped[Array, "..."]]:
        """Return the operands in the kernel's layout, by name."""
        gating, g = self.scan.gating, operands.g
        if operands.segment_ids is not None:
            # exp(-1e4) is exactly zero.
            reset = RESET * (1 if gating is None else gating.normalizer)
            starts = starts_of_segments(operands.segment_ids, self.scan)[:, :, None, None]
            g = g.astype(chip_dtype(g.dtype))
            g = jnp.where(starts, jnp.asarray(reset, g.dtype), g)
        fill = 0.0 if gating is None else NO_DECAY_LOGIT
        arrays = operands._replace(g=None, segment_ids=None)._asdict()
        inputs = {name: self.operand(name, x) for name, x in arrays.items() if x is not None}
        return inputs | {"g": self.pack("g", g, fill)}

    def operand(self, name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return one operand, or a tangent of it, in the kernel's layout."""
        if FORM[name] in TOKENS:
            return self.pack(name, x)
        x = x.astype(jnp.float32)
        if FORM[name] == "state":
            return self.pack_state(x)
        return jnp.tile(_pad(x[:, None], (1, self.tiling.value_width)), (1, 1, self.heads))

    def pack(self, name: str, x: Float[Array, "b t h w"], fill: float = 0.0) -> Float[Array, "b *s lanes"]:
        """Pad an array and put its heads side by side and its tokens in the kernel's order."""
        if self.reordered:
            x = to_scan_order(x, self.scan.grid, "column")
        shape = (self.steps * self.rows, self.heads, self._width(name))
        x = _pad(x.astype(chip_dtype(x.dtype)), shape, fill)
        return x.reshape(x.shape[0], *self._order, -1)

    def _width(self, name: str) -> int:
        """Return the padded width of one head in an array of tokens."""
        return self.tiling.key_width if FORM[name] == "keys" else self.tiling.value_width

    def unpack(self, x: Float[Array, "b *s lanes"], like: Float[Array, "b t h w"]) -> Float[Array, "b t h w"]:
        """Invert `pack`, into the shape and dtype of `like`."""
        _, tokens, heads, width = like.shape
        x = x.reshape(x.shape[0], self.steps * self.rows, self.heads, -1)[:, :tokens, :heads, :width]
        if self.reordered:
            x = to_raster_order(x, self.scan.grid, "column")
        return x.astype(like.dtype)

    def pack_state(self, x: Float[Array, "b h k v"]) -> Float[Array, "b height lanes"]:
        """Pad and transpose a state and put its heads side by side."""
        x = _pad(x, (self.heads, self.tiling.key_width, self.tiling.value_width))
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)

    def unpack_state(self, x: Float[Array, "b height lanes"]) -> Float[Array, "b h k v"]:
        """Invert `pack_state`."""
        _, _, heads, keys, values = self.shape
        x = x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 3, 1)
        return x[:, :heads, :keys, :values]

    def trim_states(self, x: Float[Array, "b n height lanes"], slots: int) -> Float[Array, "b m v hk"]:
        """Remove the padding of saved states: [B, slots, V, H * K]."""
        _, _, heads, keys, values = self.shape
        x = x.reshape(*x.shape[:3], self.heads, -1)[:, :slots, :values, :heads, :keys]
        return x.reshape(*x.shape[:3], -1)

    def pad_states(self, x: Float[Array, "b m v hk"]) -> Float[Array, "b n height lanes"]:
        """Invert `trim_states`. Chunks of padding, which were not saved, become zeros."""
        x = x.reshape(*x.shape[:3], self.shape[2], -1)
        slots = max(x.shape[1], self.steps * self.tiling.chunks)
        x = _pad(x, (slots, self.tiling.value_width, self.heads, self.tiling.key_width))
        return x.reshape(*x.shape[:3], -1)

    def run(
        self,
        name: str,
        body: Callable[..., None],
        inputs: dict[str, Shaped[Array, "..."]],
        results: dict[str, jnp.dtype],
        slots: int = 0,
        backward: bool = False,
        states: tuple[str, ...] = ("state",),
    ) -> dict[str, Shaped[Array, "..."]]:
        """Call the kernel.

        Args:
            name: the compiled kernel's name.
            body: the kernel, a function of refs by name and the tiling.
            inputs: the operands by name.
            results: dtype of each result.
            slots: number of saved states.
            backward: whether the last token comes first.
            states: names of the states that a step carries to the next one.
        """
        grid = (self.shape[0], self.head_blocks, self.steps)
        outputs = {key: self._result(key, dtype, slots) for key, dtype in results.items()}
        last_first = self.scan.reverse != backward
        specs = {key: self._spec(FORM[key], last_first) for key in (*inputs, *outputs)}
        carried = (2, self.tiling.value_width, self.tiling.heads * self.tiling.key_width)

        tokens = [key for key in specs if FORM[key] in TOKENS]
        moved = tokens if self.columns else []
        dtypes = {key: x.dtype for key, x in (*inputs.items(), *outputs.items())}
        scratch = [pltpu.VMEM(carried, jnp.float32) for _ in states]
        for key in moved:
            width = self.tiling.heads * self._width(key)
            shape, dtype = (self.rows, width), dtypes[key]
            if key in inputs:
                shape, dtype = Columns.words_of(self.scan.grid[0], self.columns, width, dtype)
            scratch.append(pltpu.VMEM(shape, dtype))

        def kernel(*refs: Any) -> None:
            names = (*specs, *states)
            blocks = dict(zip(names, refs[: len(names)], strict=True))
            in_order = dict(zip(moved, refs[len(names) :], strict=True))
            views: dict[str, Tokens | Columns] = {
                key: Tokens((blocks | in_order)[key], self.tiling.chunk) for key in tokens
            }
            for key in moved:
                if key in inputs:
                    shape = (self.tiling.chunk, self.scan.grid[0], self.columns, dtypes[key])
                    views[key] = columns = Columns(in_order[key], *shape)
                    columns.fill(blocks[key])
            body(blocks | views, self.tiling)
            for key in moved:
                if key in outputs:
                    by_rows(in_order[key], blocks[key])

        call = pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[specs[key] for key in inputs],
            out_specs=[specs[key] for key in outputs],
            out_shape=list(outputs.values()),
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=tuning.blocks().vmem_limit_bytes,
            ),
            cost_estimate=self._cost((*inputs.values(), *outputs.values()), backward, len(states)),
            interpret=self.scan.interpret,
            name=name,
        )
        return dict(zip(outputs, call(*inputs.values()), strict=True))

    def _result(self, name: str, dtype: jnp.dtype, slots: int) -> jax.ShapeDtypeStruct:
        batch, values = self.shape[0], self.tiling.value_width
        key_lanes, value_lanes = self.heads * self.tiling.key_width, self.heads * values
        shape = {
            "keys": (batch, *self._order, key_lanes),
            "values": (batch, *self._order, value_lanes),
            "state": (batch, values, key_lanes),
            "states": (batch, max(slots, self.steps * self.tiling.chunks), values, key_lanes),
            "weight": (batch, 1, value_lanes),
        }[FORM[name]]
        # The program is already per shard, so types have no mesh.
        local = jax.sharding.ManualAxisType(varying=frozenset())
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=local)

    def _spec(self, form: str, last_first: bool) -> pl.BlockSpec:
        keys, values = (self.tiling.heads * w for w in (self.tiling.key_width, self.tiling.value_width))
        height = self.tiling.value_width

        def step(s: Any) -> Any:
            return self.steps - 1 - s if last_first else s

        def tokens(width: int) -> pl.BlockSpec:
            if self.columns:
                shape = (1, self.scan.grid[0], self.columns, width)
                return pl.BlockSpec(shape, lambda b, h, s: (b, 0, step(s), h))
            return pl.BlockSpec((None, self.rows, width), lambda b, h, s: (b, step(s), h))

        return {
            "keys": tokens(keys),
            "values": tokens(values),
            "state": pl.BlockSpec((None, height, keys), lambda b, h, s: (b, 0, h)),
            "states": pl.BlockSpec(
                (None, self.tiling.chunks, height, keys), lambda b, h, s: (b, step(s), 0, h)
            ),
            "weight": pl.BlockSpec((None, 1, values), lambda b, h, s: (b, 0, h)),
        }[form]

    def _cost(self, arrays: tuple[Any, ...], backward: bool, states: int) -> pl.CostEstimate:
        _, _, _, keys, values = self.shape
        chunk = self.tiling.chunk
        per_token = 4 * keys * values + 2 * chunk * (keys + values)
        if backward:
            per_token = 8 * keys * values + chunk * (6 * keys + 4 * values)
        elif states > 1:
            per_token = 10 * keys * values + chunk * (6 * keys + 4 * values)
        tokens = math.prod(self.shape[:3])
        return pl.CostEstimate(
            flops=tokens * per_token,
            transcendentals=tokens * 2 * keys,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        )


def _columns(scan: Scan, preferred: int, chunks: int, tokens: int) -> tuple[int, int]:
    """Return the columns of a grid step of at most `tokens`, or 0 to scan rows, and the chunk size."""
    if not scan.by_columns or min(scan.grid) == 1 or scan.grid[0] * SUBLANES > tokens:
        return 0, preferred
    # There are only as many slots for saved states as chunks of 64 need.
    chunk = column_chunk(scan.grid, preferred, min(scan.chunk_size or STATE_INTERVAL, STATE_INTERVAL))
    if chunk is None:
        return 0, preferred
    wide = 2 * SUBLANES
    fits = scan.grid[1] % wide == 0 and scan.grid[0] * wide <= min(chunk * chunks, tokens)
    return (wide if fits else SUBLANES), chunk


def _pad(x: Float[Array, "..."], size: tuple[int, ...], fill: float = 0.0) -> Float[Array, "..."]:
    padding = [(0, 0), *((0, n - m) for n, m in zip(size, x.shape[1:], strict=True))]
    return jnp.pad(x, padding, constant_values=jnp.asarray(fill, x.dtype)) if x.shape[1:] != size else x
