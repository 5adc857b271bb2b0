import jax
import oracle
from pallas_gla.cpu import backend
from pallas_gla.scan import Operands, Scan, saved_shape


def test_a_bfloat16_loop_never_converts_a_complete_array():
    arrays, (d_out, d_state) = oracle.inputs(0, b=1, t=256, dtype="bfloat16", gate_dtype="bfloat16")
    operands, scan = Operands(*arrays[:4]), Scan(0.25, (1, 256), "row")
    states = jax.ShapeDtypeStruct(*saved_shape(operands, scan))
    forward = backend.forward.lower(operands, scan, save=True)
    backward = backend.backward.lower(operands, states, d_out, d_state, scan)
    for program in (forward, backward):
        assert "f32[1,256," not in program.compile().as_text()
