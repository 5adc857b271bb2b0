"""The kernel of the Hopper backend.

A program is one warpgroup. It follows one head through its chunks and keeps the transposed state [V, K] in
registers. TMA loads the next chunk into shared memory while this one is computed, and stores o.

Inside a chunk with cumulative log decays G, token i sees token j through exp(G_i - G_j), which is factorized
relative to the chunk's middle m (Yang et al. 2024, section 4.3):

    q~ = scale q exp(G - m)           k~ = k exp(m - G)         S~ = S exp(m)
    o  = tril(q~ k~^T) v + q~ S~      S' = (S~ + k~^T v) exp(G_last - m)

Mosaic GPU has no cumulative sum. Sums of log decays are products with matrices of ones, on tensor cores in
float32. The results have the layout of the factors that they multiply, and only the matrix depends on the
direction of the scan.

If half a chunk decays too much for this form, which is checked per chunk, the chunk runs in levels: a pair
j < i whose highest differing bit is n is factorized relative to the boundary between their blocks of 2**n
tokens, so that no exponent is positive.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_gla.scan import Scan

# Arguments with which `gpu.load` loads a complete ref; JAX before 0.12 takes an index.
WHOLE = ((),) if "idx" in inspect.signature(gpu.load).parameters else ()

CHUNK = 64
LEVELS = 6
VALUES = 64
# Chunks in flight, including the current one.
STAGES = 2
LOG2_E = 1.4426950408889634
# Largest decay of half a chunk, in bits, for which the factors of the fast path stay finite.
SPAN = 64.0


class Transposed(NamedTuple):
    """A transposed tile in shared memory, as an operand of a product."""

    tile: Any


@dataclasses.dataclass(frozen=True)
class HopperKernel:
    """The static shape of the kernel. Arrays of tokens are [batch * lines, tokens / lines * heads * width].

    split: whether g is float32, and so is split into a sum of two bfloat16 tiles for products.
    """

    scan: Scan
    heads: int
    keys: int
    chunks: int
    lines: int
    split: bool

    def tiles(self) -> dict[str, Any]:
        """Return the contents of a program's shared memory, by name."""
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
    """Allocate shared memory for tensor cores; all operands of a product share a swizzle."""
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
        """Return the running program. Heads vary fastest, so that concurrent programs share cache lines."""
        number, heads = lax.axis_index("program"), jnp.int32(kernel.heads)
        return cls(kernel, refs, number, lax.div(number, heads), lax.rem(number, heads))

    def run(self) -> None:
        """Run the chunks of the head."""
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
        """Return the transposed initial state, or zeros."""
        if "initial_state" not in self.refs:
            return self.matrix(jnp.zeros((VALUES, self.kernel.keys), jnp.float32))
        state = self.refs["initial_state"].at[self.number]
        if self.kernel.scan.interpret:
            return state[...].T
        state, layout = gpu.transpose_ref(state, (1, 0)), gpu.Layout.WGMMA_TRANSPOSED
        return self.matrix(gpu.load(state, *WHOLE, layout=layout, optimized=False))

    def store_last_state(self, state: Float[Array, "v k"]) -> None:
        """Store the final state."""
        end = self.refs["final_state"].at[self.number]
        if self.kernel.scan.interpret:
            end[...] = state.T
        else:
            gpu.transpose_ref(end, (1, 0))[...] = gpu.layout_cast(state, gpu.Layout.WGMMA_TRANSPOSED)

    def write_order(self) -> None:
        """Store the matrices that depend on the order of a tile's tokens.

        order: maps log decays to their cumulative sums relative to the middle.
        level: 1 + the highest bit in which i and j differ, 0 if i = j, negative for j > i.
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
        """Run a chunk, store o, and return the next state."""
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
            # Wait until the products have read the tile.
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
        """Run the chunk in levels. The scores are collected in the tile of o."""
        refs, scale = self.refs, self.kernel.scan.scale

        def decay(ones: Bool[Array, "c c"]) -> Float[Array, "c k"]:
            [total] = self.products([(ones.astype(jnp.float32).astype(jnp.bfloat16), x) for x in g])
            return jnp.exp2(total * LOG2_E)

        def factors(n: Int[Array, ""]) -> tuple[Float[Array, "c k"], Float[Array, "c k"]]:
            """Return q decayed from the starts of blocks of 2**n tokens, and k decayed to their ends."""
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
        """Store o in shared memory, from `k_tilde` and `s_tilde` there, and return v^T k~."""
        refs, v = self.refs, self.refs["v_tile"].at[slot]
        o, update = self.products(
            [(scores, v), (q_tilde, Transposed(refs["s_tilde"]))],
            [(Transposed(v), refs["k_tilde"])],
        )
        refs["o_tile"][...] = o.astype(jnp.bfloat16)
        return update

    def log_decays(self, slot: Int[Array, ""]) -> list[Any]:
        """Return bfloat16 tiles that sum to g."""
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
        """Return q or k times a factor."""
        return (self.refs[f"{name}_tile"][slot].astype(jnp.float32) * factor).astype(jnp.bfloat16)

    def level(self) -> Float[Array, "c c"]:
        """Load the levels of `write_order`, again for each use to save registers."""
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
        """Start to copy a chunk into shared memory."""
        for name in "gkqv":
            tile = self.refs[f"{name}_tile"].at[slot]
            for rows, place in self.pieces(chunk, tile.shape[-1]):
                gpu.copy_gmem_to_smem(self.refs[name].at[place], tile.at[rows], self.refs["loaded"].at[slot])

    def store_state(self, chunk: Int[Array, ""]) -> None:
        """Start to save the state that enters a chunk."""
        kernel = self.kernel
        row = (self.element * kernel.chunks + chunk) * VALUES
        place = pl.ds(row, VALUES), pl.ds(self.head * kernel.keys, kernel.keys)
        gpu.copy_smem_to_gmem(self.refs["s_tilde"], self.refs["states"].at[place])

    def matrix(self, x: Shaped[Array, "m n"]) -> Shaped[Array, "m n"]:
        """Convert to the layout of tensor cores, except in interpret mode, where JAX 0.10 has no layouts."""
        return x if self.kernel.scan.interpret else gpu.layout_cast(x, gpu.Layout.WGMMA)

    def products(self, *sums: Sequence[tuple[Any, Any]]) -> list[Float[Array, "m n"]]:
        """Return sums of matrix products, accumulated in float32 and issued together.

        Interpret mode uses plain JAX, because it multiplies neither registers nor transposed tiles.
        """
        if self.kernel.scan.interpret:
            dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
            return [
                functools.reduce(jnp.add, (dot(_value(x), _value(y)) for x, y in terms)) for terms in sums
            ]

        def issue(*accumulators: Any) -> list[Float[Array, "m n"]]:
            for accumulator, terms in zip(accumulators, sums, strict=True):
                for x, y in terms:
                    gpu.wgmma(accumulator, _operand(x), _operand(y))
            # The barrier keeps arithmetic from moving ahead of the wait for the products.
            return lax.optimization_barrier([accumulator[...] for accumulator in accumulators])

        shapes = [(CHUNK, _operand(terms[0][1]).shape[1]) for terms in sums]
        # JAX's stubs do not export ACC.
        accumulators = [gpu.ACC(shape, jnp.float32) for shape in shapes]  # pyright: ignore
        return pl.run_scoped(issue, *accumulators)


def _operand(x: Any) -> Any:
    return gpu.transpose_ref(x.tile, (1, 0)) if isinstance(x, Transposed) else x


def _value(x: Any) -> Float[Array, "m n"]:
    return x.tile[...].T if isinstance(x, Transposed) else x[...]
