import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from pallas_gla import gla
from pallas_gla.cpu.layout import Layout
from pallas_gla.scan import Operands, Scan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_needs_no_temporary_float32_array_of_all_tokens_but_the_states(dtype):
    """In bfloat16, XLA for CPUs used to convert complete arrays in every step of a loop."""
    tokens, keys, values = 2**14, 16, 32
    shapes = ((1, tokens, 1, width) for width in (keys, keys, values, keys, values))
    *arrays, d_out = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def gradients(arrays, d_out):
        o, vjp = jax.vjp(gla, *arrays)
        return o, vjp(d_out)

    memory = jax.jit(gradients).lower(arrays, d_out).compile().memory_analysis()
    assert memory is not None
    states = tokens // 64 * keys * values * 4
    # XLA may copy the bits of bfloat16 operands and results (see `as_bits`).
    bits = 2 * 2 * tokens * (3 * keys + 2 * values) if dtype == "bfloat16" else 0
    assert memory.temp_size_in_bytes < states + bits + 4 * tokens * keys


def test_only_chunks_of_finite_numbers_and_bounded_decays_run_in_blocks():
    (q, k, v, g, state), (d_out, _) = oracle.inputs(0, t=40)
    arrays = {"q": q, "k": k, "v": v, "g": g, "d_out": d_out}
    scan = Scan(0.25, (1, 40), "row", chunk_size=16)

    @jax.jit
    def regular(d_out, **arrays):
        layout = Layout(Operands(**arrays), scan)
        return layout.regular(layout.prepare(Operands(**arrays)), layout.prepare_tokens(d_out))

    def irregular(**changes):
        return np.flatnonzero(~np.asarray(regular(**(arrays | changes)))).tolist()

    assert irregular() == []
    for name, x in arrays.items():
        for value in (np.nan, np.inf, 1e8):
            assert irregular(**{name: jnp.asarray(x).at[1, 20, 0, 3].set(value)}) == [1], (name, value)
    # The decays of any eight tokens that start at a multiple of eight may add up to 30.
    assert irregular(g=jnp.full_like(g, -3.7)) == []
    assert irregular(g=g.at[1, 8:16, 0, 3].set(-3.8)) == [0]


@pytest.mark.parametrize(("first", "later"), [(0.0, 1.0), (0.0, np.nan), (np.inf, 1.0), (1e8, 1e8)])
def test_a_chunk_runs_in_blocks_if_its_tokens_and_its_state_are_regular(first, later):
    x = jnp.zeros((1, 64, 1, 16))
    layout = Layout(Operands(x, x, x, x), Scan(0.25, (1, 64), "row", chunk_size=16))

    def fast(i, carry):
        state, in_blocks = carry
        return state, in_blocks.at[i].set(True)

    def exact(i, carry):
        state, in_blocks = carry
        return jnp.full_like(state, later), in_blocks

    @jax.jit
    def in_blocks(first):
        carry = jnp.full((1, 1, 16, 16), first), jnp.zeros(4, bool)
        return layout.loop(jnp.array([True, False, True, True]), fast, exact, carry)[1]

    is_small = abs(first) < 1e3, abs(later) < 1e3
    assert in_blocks(first).tolist() == [is_small[0], False, is_small[1], is_small[1]]
