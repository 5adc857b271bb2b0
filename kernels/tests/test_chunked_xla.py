import jax
import oracle
import pytest
from gla_test_base import GLATestBase
from pallas_gla import gla
from range_tests import NonFiniteTests, RangeTests


class TestChunkedXla(NonFiniteTests, RangeTests, GLATestBase):
    implementation = "xla"

    @pytest.mark.parametrize("chunk_size", [16, 64])  # several chunks, one chunk
    def test_reverse_mode_saves_only_inputs_and_chunk_states(self, chunk_size):
        arrays, _ = oracle.inputs(0, t=64, h=2, k=16, v=32)
        options = {"chunk_size": chunk_size, "implementation": self.implementation}
        _, vjp = jax.vjp(lambda *x: gla(*x[:4], initial_state=x[4], **options), *arrays)
        saved = sum(x.nbytes for x in jax.tree.leaves(vjp))
        inputs = sum(x.nbytes for x in arrays)
        states = 64 // chunk_size * arrays[4].nbytes
        assert saved <= 1.01 * (inputs + states)
