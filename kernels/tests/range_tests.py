"""Tests of NaN, infinity and large values, for the classes of implementations that promise them."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gla_test_base import FLOAT32
from pallas_gla import gated_gla_2d


class NonFiniteTests:
    """Tests of implementations in which NaN and infinity reach only the tokens that depend on them."""

    def check_where(self, kept, arrays, cotangents, expected, segment_ids=None):
        """Compare all arrays of tokens with the oracle, at the tokens `kept` [B, T]."""
        actual = dict(zip(oracle.NAMES, self.results(arrays, cotangents, segment_ids), strict=True))
        for name in ("o", "dq", "dk", "dv", "dg"):
            pair = (np.where(kept[..., None, None], x[name], 0) for x in (actual, expected))
            oracle.assert_close(*([x] for x in pair), FLOAT32, [name])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("names", ["qkvgo", "v", "o"])
    def test_values_of_another_segment_reach_no_token(self, value, names):
        (*tokens, state), (d_o, d_state) = oracle.inputs(16, t=40)
        # Padding at the end of one batch element and at the start of the other.
        ids = np.arange(40) >= np.array([[25], [9]])
        padding = ids == np.array([[True], [False]])
        expected = oracle.recurrence((*tokens, state), (d_o, d_state), segment_ids=ids)
        spoiled = [
            jnp.where(padding[..., None, None], value, x) if name in names else x
            for name, x in zip("qkvgo", (*tokens, d_o), strict=True)
        ]
        *tokens, d_o = spoiled
        segment_ids = jnp.asarray(ids, jnp.int32)
        self.check_where(~padding, (*tokens, state), (d_o, d_state), expected, segment_ids)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_of_later_tokens_and_gradients_of_earlier_outputs_reach_no_token(self, value):
        (q, k, v, g, state), (d_o, d_state) = oracle.inputs(17, t=40)
        token = np.arange(40)[None, :, None, None]
        d_o, d_state = jnp.where(token < 30, d_o, 0), jnp.zeros_like(d_state)
        expected = oracle.recurrence((q, k, v, g, state), (d_o, d_state))
        v, d_o = jnp.where(token < 30, v, value), jnp.where(token < 10, value, d_o)
        kept = np.broadcast_to((token[..., 0, 0] >= 10) & (token[..., 0, 0] < 30), (2, 40))
        self.check_where(kept, (q, k, v, g, state), (d_o, d_state), expected)

    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("where", ["segment", "later"])
    def test_nan_in_all_arrays_and_tangents_reaches_no_token_elsewhere(self, where, gated):
        t = 40
        (*tokens, state), (d_o, _) = oracle.inputs(16, t=t, h=2)
        *dots, _ = oracle.inputs(17, t=t, h=2)[0]
        dots, tokens = (*dots, d_o), (*tokens, dots[2])  # with an output gate
        after = np.arange(t)[None, :, None, None] >= 25
        spoiled, ids = after, None
        if where == "segment":
            spoiled, ids = ~after, jnp.asarray(after[..., 0, 0], jnp.int32).repeat(2, 0)

        def scan(q, k, v, g, out_gate):
            options = {"chunk_size": 16, "initial_state": state, "segment_ids": ids} | self.backend
            if not gated:
                return self.scan(q, k, v, g, state, segment_ids=ids)[0] * out_gate
            return gated_gla_2d(
                q, k, v, 8 * g, out_gate, jnp.ones(16), grid=(1, t), direction="row", **options
            )

        @jax.jit
        def results(tokens, dots, d_o):
            o, o_dot = jax.jvp(scan, tokens, dots)
            gradients = () if where == "later" else jax.vjp(scan, *tokens)[1](d_o)
            return [jnp.where(spoiled, 0, x) for x in (o, o_dot, *gradients)]

        expected = results(tokens, dots, d_o)
        actual = results(*jax.tree.map(lambda x: jnp.where(spoiled, jnp.nan, x), (tokens, dots, d_o)))
        oracle.assert_close(actual, expected, FLOAT32, ["results"] * len(actual))

    def test_nan_reaches_every_token_that_depends_on_it(self):
        (q, k, v, g, state), (d_o, d_state) = oracle.inputs(17, t=40)
        v, d_o = v.at[:, 10].set(np.nan), d_o.at[:, 30].set(np.nan)
        o, final_state, dq, dk, dv, dg, d_initial = self.results((q, k, v, g, state), (d_o, d_state))
        reached = (o[:, 10:], final_state, dq[:, 10:], dk[:, :31], dv[:, :31], dg[:, :31], d_initial)
        for name, x in zip(oracle.NAMES, reached, strict=True):
            assert np.isnan(x).all(), name
        assert np.isfinite(o[:, :10]).all()
        assert np.isfinite(dv[:, 31:]).all()


class RangeTests:
    """Tests of implementations in which only results can overflow in float16."""

    # Sizes of q, k, v, initial_state and d_o. States, chained states or v . d_o exceed 65,504.
    @pytest.mark.parametrize(
        "sizes", [(1e-2, 40, 40, 1e5, 1), (1e-3, 1e-3, 1, 1e5, 1), (1e-4, 1e-4, 100, 1, 2e3)], ids=str
    )
    def test_float16_results_do_not_depend_on_the_range_of_intermediates(self, sizes):
        (*qkv, g, state), (d_o, d_state) = oracle.inputs(18, t=64, dtype="float16", gate_dtype="float16")
        qkv = (size * (1 + 0.1 * x) for size, x in zip(sizes, qkv, strict=False))
        q, k, v, d_o = (x.astype("float16") for x in (*qkv, sizes[4] * d_o))
        arrays, cotangents = (q, k, v, 0 * g, sizes[3] * state), (d_o, 0 * d_state)
        actual, expected = self.results(arrays, cotangents), oracle.recurrence(arrays, cotangents)
        found = zip(oracle.NAMES, actual, expected.values(), strict=True)
        inside = [x for x in found if "state" in x[0] or np.max(np.abs(x[2])) < 6e4]
        assert len(inside) >= 5
        oracle.assert_close(*zip(*((a, e) for _, a, e in inside), strict=True), 5e-3, [x[0] for x in inside])
