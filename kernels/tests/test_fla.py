import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from pallas_gla import gla
from pallas_gla.fla import chunk_gla, fused_recurrent_gla

# One sequence is empty.
OFFSETS = np.array([0, 7, 7, 8, 20])
(*TOKENS, _), (COTANGENT, _) = oracle.inputs(0, b=1, h=2, k=16, v=32)
STATES = oracle.inputs(1, b=4, h=2, k=16, v=32)[0][4]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "gla_2_strong_T130_K16_V32_h0.npz"


def one_by_one(tokens, states, reverse=False):
    """Return the output and the final states, scanning one sequence at a time."""
    outputs, finals = [], []
    for start, end, state in zip(OFFSETS[:-1], OFFSETS[1:], states, strict=True):
        if start < end:
            part = (x[:, start:end] for x in tokens)
            options = {"return_final_state": True, "reverse": reverse, "implementation": "reference"}
            o, state = gla(*part, initial_state=state[None], **options)
            outputs, state = [*outputs, o], state[0]
        finals.append(state)
    return jnp.concatenate(outputs, axis=1), jnp.stack(finals)


def test_matches_fla_called_with_the_same_arguments():
    file = {name: jnp.asarray(x, jnp.float32) for name, x in np.load(GOLDEN).items()}
    q, k, v, g, o = (file[name].swapaxes(1, 2) for name in "qkvgo")
    actual = chunk_gla(q, k, v, g, None, file["h0"], True)
    oracle.assert_close(actual, (o, file["ht"]), 2e-5, oracle.NAMES[:2])


def test_equals_gla_and_returns_none_for_a_state_that_was_not_requested():
    o, state = chunk_gla(*TOKENS, scale=0.5)
    assert state is None
    np.testing.assert_array_equal(o, gla(*TOKENS, scale=0.5))


def test_value_first_states_are_transposed():
    options = {"initial_state": STATES[:1], "output_final_state": True}
    o, state = chunk_gla(*TOKENS, **options)
    options |= {"initial_state": STATES[:1].swapaxes(2, 3), "state_v_first": True}
    o_v_first, state_v_first = chunk_gla(*TOKENS, **options)
    np.testing.assert_array_equal(o_v_first, o)
    np.testing.assert_array_equal(state_v_first, state.swapaxes(2, 3))


@pytest.mark.parametrize("traced", [False, True])
def test_sequences_without_states_equal_separate_calls(traced):
    if traced:
        o, _ = jax.jit(lambda offsets: chunk_gla(*TOKENS, cu_seqlens=offsets))(OFFSETS)
    else:
        o, _ = chunk_gla(*TOKENS, cu_seqlens=OFFSETS)
    expected, _ = jax.jit(one_by_one)(TOKENS, jnp.zeros_like(STATES))
    oracle.assert_close([o], [expected], 2e-5, ["o"])


@pytest.mark.parametrize("reverse", [False, True])
def test_sequences_with_states_equal_separate_calls_in_values_and_gradients(reverse):
    def together(tokens, states):
        function = functools.partial(fused_recurrent_gla, reverse=True) if reverse else chunk_gla
        return function(*tokens, initial_state=states, output_final_state=True, cu_seqlens=OFFSETS)

    @functools.partial(jax.jit, static_argnums=0)
    def results(function, tokens, states, cotangents):
        out, vjp = jax.vjp(function, tokens, states)
        return jax.tree.leaves((out, vjp(cotangents)))

    arrays = (TOKENS, STATES, (COTANGENT, STATES))
    expected = results(functools.partial(one_by_one, reverse=reverse), *arrays)
    oracle.assert_close(results(together, *arrays), expected, 2e-5)


def test_traced_offsets_use_the_concrete_copy():
    run = functools.partial(chunk_gla, *TOKENS, output_final_state=True)
    actual = jax.jit(lambda offsets: run(cu_seqlens=offsets, cu_seqlens_cpu=OFFSETS))(OFFSETS)
    oracle.assert_close(actual, run(cu_seqlens=OFFSETS), 1e-6, oracle.NAMES[:2])
    with pytest.raises(NotImplementedError, match="cu_seqlens: got a traced array .* expected a NumPy array"):
        jax.jit(lambda offsets: run(cu_seqlens=offsets))(OFFSETS)


def test_recurrent_form_without_decay_is_linear_attention():
    q, k, v, _ = TOKENS
    o, _ = fused_recurrent_gla(q, k, v, scale=1.0, reverse=True)
    scores = np.triu(np.einsum("bthk,bshk->bhts", q, k))
    oracle.assert_close([o], [np.einsum("bhts,bshv->bthv", scores, v)], 2e-5, ["o"])


BAD = [
    (
        {"cu_seqlens": OFFSETS[:-1]},
        r"cu_seqlens: got \[0, 7, 7, 8\]; expected increasing offsets from 0 to 20",
    ),
    ({"cu_seqlens": OFFSETS[::-1]}, "expected increasing offsets from 0 to 20"),
    ({"cu_seqlens": np.array(20)}, r"shape of cu_seqlens: got \(\); expected \[N \+ 1\]"),
    ({"cu_seqlens": [0, 20]}, r"invalid cu_seqlens: got list; expected an array \[N \+ 1\]"),
    ({"cu_seqlens": OFFSETS.astype(np.float32)}, "dtype of cu_seqlens: got float32; expected int32"),
    (
        {"initial_state": STATES, "cu_seqlens": OFFSETS[[0, 4]]},
        r"got \(4, 2, 16, 32\); expected \[N, H, K,",
    ),
    ({"initial_state": STATES[:1], "state_v_first": True}, r"expected \[N, H, V, K\] = \(1, 2, 32, 16\)"),
    (
        {name: jnp.concatenate([x, x]) for name, x in zip("qkvg", TOKENS, strict=True)},
        "shape of q: got B = 2; expected B = 1",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_an_invalid_argument_is_named_with_its_value_and_what_is_expected(changes, message):
    arguments = dict(zip("qkvg", TOKENS, strict=True)) | {"cu_seqlens": OFFSETS}
    if "initial_state" in changes:
        del arguments["cu_seqlens"]
    with pytest.raises(ValueError, match=message):
        chunk_gla(**(arguments | changes))


def test_decay_of_the_values_is_unsupported():
    with pytest.raises(NotImplementedError, match="unsupported gv: got .*; expected None"):
        fused_recurrent_gla(*TOKENS[:3], gv=TOKENS[2])
