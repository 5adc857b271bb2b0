import re

import jax
import oracle
from pallas_gla import gla
from test_chunked_xla import TestChunkedXla as ChunkedXla


class TestDefault(ChunkedXla):
    """On a CPU the default runs the same chunks as "xla", with its own backward pass."""

    implementation = None

    def test_under_checkpoint_only_the_recomputed_forward_pass_saves_states(self):
        arrays, _ = oracle.inputs(0)

        def loss(*arrays):
            return gla(*arrays[:4], initial_state=arrays[4]).sum()

        program = str(jax.make_jaxpr(jax.value_and_grad(jax.checkpoint(loss)))(*arrays))
        assert re.findall(r"save=(\w+)", program) == ["False", "True"]

    def test_works_without_jit(self):
        arrays, _ = oracle.inputs(1, t=3)
        with jax.disable_jit():
            o = gla(*arrays[:4], initial_state=arrays[4])
        oracle.assert_close([o], [oracle.recurrence(arrays)["o"]], 2e-5, ["o"])
