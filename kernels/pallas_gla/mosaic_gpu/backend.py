"""GLA forward for Hopper (sm_90a), as a Pallas (Mosaic GPU) kernel: an experiment beside `pallas_triton`.

A program is one warpgroup. It follows one head through its chunks with the transposed state [V, K] in
registers. TMA brings the next chunk's tokens into shared memory while this one is computed, and takes o away.

Inside a chunk with cumulative log decays G, tokens see each other through exp(G_i - G_j), which is factorised
relative to the chunk's middle m (Yang et al. 2024, section 4.3):

    q~ = scale q exp(G - m)           k~ = k exp(m - G)         S~ = S exp(m)
    o  = tril(q~ k~^T) v + q~ S~      S' = (S~ + k~^T v) exp(G_last - m)

Mosaic GPU has no cumulative sum. Sums of log decays are products with matrices of ones, by tensor cores in
float32: they come in the layout of what they multiply, and the matrix alone knows the direction of the scan.

A chunk whose halves decay too much for that, which the program finds out, is taken in levels: a pair j < i
whose highest differing bit is n is factorised relative to the boundary between them of blocks of 2**n tokens,
so that no exponent is positive at any decay.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_gla.scan import Operands, Scan, saved_shape
from pallas_gla.triton import backend as triton_backend

try:
    InterpretParams = gpu.InterpretGPUParams
except AttributeError:  # JAX 0.10
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as InterpretParams
# What `gpu.load` takes to load all: an index before JAX 0.12.
WHOLE = ((),) if "idx" in inspect.signature(gpu.load).parameters else ()

CHUNK = 64
LEVELS = 6
KEYS = (32, 64)
VALUES = 64
# Chunks in flight, the one that is computed included.
STAGES = 2
LOG2_E = 1.4426950408889634
# Either half of a chunk may decay by 2**-SPAN at most on the fast path, so that its factors stay finite.
SPAN = 64.0

# The states that `forward` saves are the ones that Triton's backward pass reads.
backward = triton_backend.backward


def unsupported(operands: Operands, scan: Scan) -> str | None:
    """Says why this kernel cannot run a scan, in one line; None if it can."""
    tokens, keys, values = operands.q.shape[1], operands.q.shape[3], operands.v.shape[3]
    v, g, lines = operands.v.dtype, operands.g.dtype, _lines(scan, tokens)
    whole = not scan.by_columns or lines in (8, 16, 32) or lines % CHUNK == 0
    checks = (
        (keys in KEYS, f"K must be {KEYS[0]} or {KEYS[1]}, got {keys}"),
        (values == VALUES, f"V must be {VALUES}, got {values}"),
        (v == jnp.bfloat16, f"v must be bfloat16, got {v}"),
        (g in (jnp.bfloat16, jnp.float32), f"g must be bfloat16 or float32, got {g}"),
        (tokens % CHUNK == 0, f"T must be a multiple of {CHUNK}, got {tokens}"),
        (whole, f"grid must have 8, 16, 32 or {CHUNK} * n rows in a scan by columns, got {scan.grid}"),
        (scan.chunk_size in (None, CHUNK), f"chunk_size must be None or {CHUNK}, got {scan.chunk_size}"),
        (scan.gating is None, "gating must be None (gla and gla_2d), got that of gated_gla_2d"),
        (operands.segment_ids is None, "segment_ids must be None, got an array"),
        (True, triton_backend.unsupported(operands, scan)),
    )
    return next((reason for fine, reason in checks if not fine), checks[-1][1])


def forward(
    operands: Operands, scan: Scan, *, save: bool
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"], Float[Array, "b n v hk"] | None]:
    """The contract of `pallas_gla.dispatch`."""
    batch, tokens, heads, keys = operands.q.shape
    kernel = HopperKernel(
        scan, heads, keys, tokens // CHUNK, _lines(scan, tokens), operands.g.dtype == jnp.float32
    )
    inputs = {name: getattr(operands, name).reshape(batch * kernel.lines, -1) for name in "qkvg"}
    state_shape = (batch * heads, keys, VALUES)
    if operands.initial_state is not None:
        inputs["initial_state"] = operands.initial_state.astype(jnp.float32).reshape(state_shape)
    results = {"o": (inputs["v"].shape, jnp.bfloat16), "final_state": (state_shape, jnp.float32)}
    states, dtype = saved_shape(operands, scan)
    if save:
        results["states"] = (batch * kernel.chunks * VALUES, heads * keys), dtype
    names, tiles = (*inputs, *results), kernel.tiles()

    def gla_forward(*refs: Any) -> None:
        refs = dict(zip(names, refs, strict=True))
        pl.run_scoped(lambda **tiles: HopperProgram.current(kernel, refs | tiles).run(), **tiles)

    launch = gpu.kernel(
        gla_forward,
        out_type=[jax.ShapeDtypeStruct(*result) for result in results.values()],
        grid=(batch * heads,),
        grid_names=("program",),
        # `commit_smem` stands wherever one warp reads what another wrote.
        compiler_params=gpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=gpu.LoweringSemantics.Lane,
        ),
        interpret=InterpretParams() if scan.interpret else None,
    )
    results = dict(zip(results, launch(*inputs.values()), strict=True))
    return (
        results["o"].reshape(operands.v.shape),
        results["final_state"].reshape(batch, heads, keys, VALUES),
        results["states"].reshape(states) if save else None,
    )


def _lines(scan: Scan, tokens: int) -> int:
    """Tokens between two that are not neighbours in memory: a column's, or all."""
    return scan.grid[0] if scan.by_columns and min(scan.grid) > 1 else tokens


class Transposed(NamedTuple):
    """An operand of a product: a tile in shared memory, transposed."""

    tile: Any


@dataclasses.dataclass(frozen=True)
class HopperKernel:
    """The static part. Arrays of tokens are seen as [batch * lines, tokens / lines * heads * width].

    split: whether g is float32, and enters products as the sum of two bfloat16.
    """

    scan: Scan
    heads: int
    keys: int
    chunks: int
    lines: int
    split: bool

    def tiles(self) -> dict[str, Any]:
        """What a program has in shared memory, by name."""
        key_tile, value_tile, square = (CHUNK, self.keys), (CHUNK, VALUES), (CHUNK, CHUNK)
        copies = 4 * (CHUNK // min(self.lines, CHUNK))
        tiles = {
            "q_tile": _tile((STAGES, *key_tile)),
            "k_tile": _tile((STAGES, *key_tile)),
            "v_tile": _tile((STAGES, *value_tile)),
            "g_tile": _tile((STAGES, *key_tile), jnp.float32 if self.split else jnp.bfloat16),
            "order": _tile(square),
            "level": _tile(square),
            "k_tilde": _tile(key_tile),
            "s_tilde": _tile(key_tile),
            "o_tile": _tile(value_tile),
            "span": gpu.SMEM((CHUNK,), jnp.float32),
            "loaded": gpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
        }
        if self.split:
            tiles["g_parts"] = _tile((2, *key_tile))
        return tiles


def _tile(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory as the tensor cores read it: all operands of a product with the same swizzle."""
    columns = 32
    swizzle = gpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
    return gpu.SMEM(shape, dtype, transforms=(gpu.TilingTransform((8, columns)), swizzle))


@dataclasses.dataclass(frozen=True)
class HopperProgram:
    """The running program: its head, and the arrays and tiles of shared memory by name."""

    kernel: HopperKernel
    refs: dict[str, Any]
    number: Int[Array, ""]
    element: Int[Array, ""]
    head: Int[Array, ""]

    @classmethod
    def current(cls, kernel: HopperKernel, refs: dict[str, Any]) -> "HopperProgram":
        """Heads vary fastest, so that programs that run at once share cache lines."""
        number, heads = lax.axis_index("program"), jnp.int32(kernel.heads)
        return cls(kernel, refs, number, lax.div(number, heads), lax.rem(number, heads))

    def run(self) -> None:
        """Follows the head through its chunks."""
        kernel, refs = self.kernel, self.refs
        for chunk in range(min(STAGES, kernel.chunks)):
            self.load(jnp.int32(chunk), jnp.int32(chunk))
        self.write_order()
        state = self.first_state()
        if "states" in refs:
            refs["s_tilde"][...] = state.astype(jnp.bfloat16)
            gpu.commit_smem()
            self.store_state(jnp.int32(0))
        gpu.commit_smem()
        state = lax.fori_loop(jnp.int32(0), jnp.int32(kernel.chunks), self.chunk, state)
        self.store_last_state(state)
        gpu.wait_smem_to_gmem(0)

    def first_state(self) -> Float[Array, "v k"]:
        """The transposed initial state, or zeros."""
        if "initial_state" not in self.refs:
            return self.matrix(jnp.zeros((VALUES, self.kernel.keys), jnp.float32))
        state = self.refs["initial_state"].at[self.number]
        if self.kernel.scan.interpret:
            return state[...].T
        state, layout = gpu.transpose_ref(state, (1, 0)), gpu.Layout.WGMMA_TRANSPOSED
        return self.matrix(gpu.load(state, *WHOLE, layout=layout, optimized=False))

    def store_last_state(self, state: Float[Array, "v k"]) -> None:
        """Writes the final state."""
        end = self.refs["final_state"].at[self.number]
        if self.kernel.scan.interpret:
            end[...] = state.T
        else:
            gpu.transpose_ref(end, (1, 0))[...] = gpu.layout_cast(state, gpu.Layout.WGMMA_TRANSPOSED)

    def write_order(self) -> None:
        """Writes the matrices that know the order of a tile's tokens.

        order: takes log decays to their cumulative sums, relative to the middle.
        level: 1 + the highest bit in which i and j differ, 0 if none, negative for j > i.
        """
        i, j = (self.matrix(lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)) for axis in (0, 1))
        if self.kernel.scan.reverse:
            i, j = CHUNK - 1 - i, CHUNK - 1 - j
        later, half = j > i, CHUNK // 2
        order = ((j >= half) & ~later).astype(jnp.float32) - ((j < half) & later).astype(jnp.float32)
        self.refs["order"][...] = order.astype(jnp.bfloat16)
        level = (32 - lax.clz(i ^ j)).astype(jnp.float32)
        self.refs["level"][...] = jnp.where(later, -level, level).astype(jnp.bfloat16)

    def chunk(self, chunk: Int[Array, ""], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
        """Runs a chunk, stores o, and returns the next state."""
        kernel, refs = self.kernel, self.refs
        slot = lax.rem(chunk, jnp.int32(STAGES))
        gpu.barrier_wait(refs["loaded"].at[slot])
        g = self.log_decays(slot)
        ones = self.matrix(jnp.full((CHUNK, CHUNK // 2), 1, jnp.bfloat16))
        halves = [pl.ds(0, CHUNK // 2), pl.ds(CHUNK // 2, CHUNK // 2)]
        first, second = halves[::-1] if kernel.scan.reverse else halves
        middle, tail, total = self.products(
            [(ones, x.at[first]) for x in g],
            [(ones, x.at[second]) for x in g],
            [(refs["order"], x) for x in g],
        )
        middle, tail, total = (x * LOG2_E for x in (middle, tail, total))
        gpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs["span"][...] = jnp.min(jnp.minimum(middle, tail), axis=1)
        s_tilde = state * jnp.exp2(middle)
        refs["k_tilde"][...] = self.scaled("k", slot, jnp.exp2(-total))
        refs["s_tilde"][...] = s_tilde.astype(jnp.bfloat16)
        q_tilde = self.scaled("q", slot, jnp.exp2(total) * kernel.scan.scale)
        gpu.commit_smem()

        def fast(state: Float[Array, "v k"]) -> Float[Array, "v k"]:
            [scores] = self.products([(q_tilde, Transposed(refs["k_tilde"]))])
            scores = jnp.where(self.level() >= 0, scores, 0.0).astype(jnp.bfloat16)
            return (s_tilde + self.write_o(slot, scores, q_tilde)) * jnp.exp2(tail)

        safe = functools.partial(self.safe, slot, g)
        state = lax.cond(refs["span"][0] >= -SPAN, fast, safe, state)
        if "states" in refs:
            # The products have read what is there.
            gpu.commit_smem()
            refs["s_tilde"][...] = state.astype(jnp.bfloat16)
        gpu.commit_smem()
        for rows, place in self.pieces(chunk, VALUES):
            gpu.copy_smem_to_gmem(refs["o_tile"].at[rows], refs["o"].at[place])
        if "states" in refs:
            pl.when(chunk + 1 < kernel.chunks)(lambda: self.store_state(chunk + 1))
        pl.when(chunk + STAGES < kernel.chunks)(lambda: self.load(chunk + STAGES, slot))
        return state

    def safe(self, slot: Int[Array, ""], g: Sequence[Any], state: Float[Array, "v k"]) -> Float[Array, "v k"]:
        """The chunk in levels; the scores are collected where o will be."""
        refs, scale = self.refs, self.kernel.scan.scale

        def decay(ones: Bool[Array, "c c"]) -> Float[Array, "c k"]:
            [total] = self.products([(ones.astype(jnp.float32).astype(jnp.bfloat16), x) for x in g])
            return jnp.exp2(total * LOG2_E)

        def factors(n: Int[Array, ""]) -> tuple[Float[Array, "c k"], Float[Array, "c k"]]:
            """q decayed from the beginnings of blocks of 2**n, k decayed to their ends."""
            level, n = self.level(), n.astype(jnp.float32)
            k = self.scaled("k", slot, decay((level < 0) & (level >= -n)))
            return self.scaled("q", slot, decay((level >= 0) & (level <= n)) * scale), k

        def add_scores(level: Int[Array, ""], q: Float[Array, "c k"], k: Float[Array, "c k"]) -> None:
            gpu.commit_smem()
            refs["k_tilde"][...] = k
            gpu.commit_smem()
            [scores] = self.products([(q, Transposed(refs["k_tilde"]))])
            mine = self.level() == level.astype(jnp.float32)
            refs["o_tile"][...] = jnp.where(mine, scores.astype(jnp.bfloat16), refs["o_tile"][...])

        refs["o_tile"][...] = self.matrix(jnp.zeros((CHUNK, CHUNK), jnp.bfloat16))
        add_scores(jnp.int32(0), self.scaled("q", slot, scale), refs["k_tile"][slot])
        lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), lambda n, _: add_scores(n + 1, *factors(n)), None)
        gpu.commit_smem()
        refs["s_tilde"][...] = state.astype(jnp.bfloat16)
        q_tilde, refs["k_tilde"][...] = factors(jnp.int32(LEVELS))
        gpu.commit_smem()
        state *= decay(self.level() >= -LEVELS)
        return state + self.write_o(slot, refs["o_tile"][...], q_tilde)

    def write_o(
        self, slot: Int[Array, ""], scores: Float[Array, "c c"], q_tilde: Float[Array, "c k"]
    ) -> Float[Array, "v k"]:
        """Leaves o in shared memory, from `k_tilde` and `s_tilde` there, and returns v^T k~."""
        refs, v = self.refs, self.refs["v_tile"].at[slot]
        o, update = self.products(
            [(scores, v), (q_tilde, Transposed(refs["s_tilde"]))],
            [(Transposed(v), refs["k_tilde"])],
        )
        refs["o_tile"][...] = o.astype(jnp.bfloat16)
        return update

    def log_decays(self, slot: Int[Array, ""]) -> list[Any]:
        """Tiles in bfloat16 that add up to g."""
        tile = self.refs["g_tile"].at[slot]
        if not self.kernel.split:
            return [tile]
        g, parts = tile[...], self.refs["g_parts"]
        high = g.astype(jnp.bfloat16)
        parts[0] = high
        parts[1] = (g - high.astype(jnp.float32)).astype(jnp.bfloat16)
        gpu.commit_smem()
        return [parts.at[0], parts.at[1]]

    def scaled(self, name: str, slot: Int[Array, ""], factor: Any) -> Float[Array, "c k"]:
        """q or k, times a factor."""
        return (self.refs[f"{name}_tile"][slot].astype(jnp.float32) * factor).astype(jnp.bfloat16)

    def level(self) -> Float[Array, "c c"]:
        """What `write_order` wrote, read again each time: registers are scarce."""
        return self.refs["level"][...].astype(jnp.float32)

    def pieces(self, chunk: Int[Array, ""], width: int) -> Iterator[tuple[Any, tuple[Any, Any]]]:
        """Yield the rows of a tile, and the slice of a [lines, columns] array, that hold a chunk's tokens."""
        kernel = self.kernel
        if kernel.scan.reverse:
            chunk = kernel.chunks - 1 - chunk
        size = min(kernel.lines, CHUNK)
        per_line = jnp.int32(kernel.lines // size)
        for i in range(CHUNK // size):
            piece = chunk * (CHUNK // size) + i
            row = self.element * kernel.lines + lax.rem(piece, per_line) * size
            column = (lax.div(piece, per_line) * kernel.heads + self.head) * width
            yield pl.ds(i * size, size), (pl.ds(row, size), pl.ds(column, width))

    def load(self, chunk: Int[Array, ""], slot: Int[Array, ""]) -> None:
        """Starts to copy a chunk into shared memory."""
        for name in "gkqv":
            tile = self.refs[f"{name}_tile"].at[slot]
            for rows, place in self.pieces(chunk, tile.shape[-1]):
                gpu.copy_gmem_to_smem(self.refs[name].at[place], tile.at[rows], self.refs["loaded"].at[slot])

    def store_state(self, chunk: Int[Array, ""]) -> None:
        """Starts to copy the state that enters a chunk to where it is saved."""
        kernel = self.kernel
        row = (self.element * kernel.chunks + chunk) * VALUES
        place = pl.ds(row, VALUES), pl.ds(self.head * kernel.keys, kernel.keys)
        gpu.copy_smem_to_gmem(self.refs["s_tilde"], self.refs["states"].at[place])

    def matrix(self, x: Shaped[Array, "m n"]) -> Shaped[Array, "m n"]:
        """The array in registers as the tensor cores hold it; JAX 0.10 does not interpret layouts."""
        return x if self.kernel.scan.interpret else gpu.layout_cast(x, gpu.Layout.WGMMA)

    def products(self, *sums: Sequence[tuple[Any, Any]]) -> list[Float[Array, "m n"]]:
        """Sums of matrix products, added up in float32 and all under way at once.

        The interpreter multiplies neither registers nor transposed tiles, so there it is plain JAX.
        """
        if self.kernel.scan.interpret:
            dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
            return [sum(dot(_value(x), _value(y)) for x, y in terms) for terms in sums]

        def issue(*accumulators: Any) -> list[Float[Array, "m n"]]:
            for accumulator, terms in zip(accumulators, sums, strict=True):
                for x, y in terms:
                    gpu.wgmma(accumulator, _operand(x), _operand(y))
            # The barrier keeps arithmetic from being moved before the wait for the products.
            return lax.optimization_barrier([accumulator[...] for accumulator in accumulators])

        shapes = [(CHUNK, _operand(terms[0][1]).shape[1]) for terms in sums]
        return pl.run_scoped(issue, *(gpu.ACC(shape, jnp.float32) for shape in shapes))


def _operand(x: Any) -> Any:
    return gpu.transpose_ref(x.tile, (1, 0)) if isinstance(x, Transposed) else x


def _value(x: Any) -> Float[Array, "m n"]:
    return x.tile[...].T if isinstance(x, Transposed) else x[...]
