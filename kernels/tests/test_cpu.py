import jax
import jax.numpy as jnp
import numpy as np
import oracle
from pallas_gla.cpu import backend
from pallas_gla.cpu.layout import Layout
from pallas_gla.scan import Operands, Scan, saved_shape


def test_a_bfloat16_loop_never_converts_a_complete_array():
    arrays, (d_out, d_state) = oracle.inputs(0, b=1, t=256, dtype="bfloat16", gate_dtype="bfloat16")
    operands, scan = Operands(*arrays[:4]), Scan(0.25, (1, 256), "row")
    states = jax.ShapeDtypeStruct(*saved_shape(operands, scan))
    layout = Layout(operands, scan)

    @jax.jit
    def regular_scan(operands, states, d_out, d_state):
        forward = backend._forward(operands, layout, save=True)
        return forward, backend._backward(operands, states, d_out, d_state, layout)

    program = regular_scan.lower(operands, states, d_out, d_state)
    assert "f32[1,256," not in str(program.compile().as_text())


def test_only_finite_numbers_and_bounded_decays_run_in_blocks():
    (q, k, v, g, state), (d_out, _) = oracle.inputs(0, t=40)
    arrays = {"q": q, "k": k, "v": v, "g": g, "initial_state": state, "d_out": d_out}
    scan = Scan(0.25, (1, 40), "row")

    @jax.jit
    def regular(d_out, **arrays):
        operands = Operands(**arrays)
        return Layout(operands, scan).regular(operands, d_out)

    assert regular(**arrays)
    for name, x in arrays.items():
        for value in (np.nan, np.inf, 1e10):
            spoiled = jnp.asarray(x).at[(1,) + (-1,) * (x.ndim - 1)].set(value)
            assert not regular(**(arrays | {name: spoiled})), (name, value)
    # The decays of any eight tokens that start at a multiple of eight may add up to 30.
    assert regular(**(arrays | {"g": jnp.full_like(g, -3.7)}))
    assert not regular(**(arrays | {"g": g.at[1, 8:16, 0, 3].set(-3.8)}))
