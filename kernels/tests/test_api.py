import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from pallas_gla import gated_gla_2d, gla, gla_2d

(Q, K, V, G, STATE), _ = oracle.inputs(0, t=6, k=4, v=8)
EMPTY = jnp.zeros((2, 0, 1, 4))
BAD = [
    ({"q": None}, r"q must be an array \[B, T, H, K\] .* got NoneType"),
    ({"q": Q[0]}, r"q must be an array \[B, T, H, K\] .* got shape \(6, 1, 4\)"),
    ({"q": EMPTY, "k": EMPTY, "g": EMPTY}, r"q must be .* without an empty axis, got shape \(2, 0, 1, 4\)"),
    ({"q": np.zeros((2, 6, 1, 4))}, "q has dtype float64, accepted are bfloat16, float16, float32"),
    ({"q": Q.astype(jnp.int32)}, "q has dtype int32, accepted are"),
    ({"k": K[:, :5]}, r"k has shape \(2, 5, 1, 4\), accepted is \[B, T, H, K\] of q = \(2, 6, 1, 4\)"),
    ({"k": K.astype(jnp.bfloat16)}, "k has dtype bfloat16, accepted are float32"),
    ({"v": V[:1]}, r"v has shape \(1, 6, 1, 8\), accepted is .* = \(2, 6, 1, 8\)"),
    ({"v": V.astype(jnp.float16)}, "v has dtype float16, accepted are float32"),
    ({"g": V}, r"g has shape \(2, 6, 1, 8\), accepted is .* = \(2, 6, 1, 4\)"),
    ({"g": G.astype(jnp.bfloat16)}, "g has dtype bfloat16, accepted are float32"),
    ({"scale": "big"}, "scale must be a finite Python number or None, got 'big'"),
    ({"scale": float("nan")}, "scale must be a finite Python number or None, got nan"),
    ({"initial_state": STATE[0]}, r"initial_state has shape \(1, 4, 8\), accepted is \[B, H, K, V\]"),
    ({"initial_state": STATE.astype(jnp.float16)}, "initial_state has dtype float16, accepted are float32"),
    ({"segment_ids": jnp.zeros((2, 6))}, "segment_ids has dtype float32, accepted are int32"),
    ({"segment_ids": jnp.zeros(6, int)}, r"segment_ids has shape \(6,\), accepted is \[B, T\] = \(2, 6\)"),
    ({"segment_ids": [0] * 6}, r"segment_ids must be an array \[B, T\], got list"),
    ({"chunk_size": 8}, "chunk_size must be a power of two >= 16 or None, got 8"),
    ({"chunk_size": 48}, "chunk_size must be a power of two >= 16 or None, got 48"),
    ({"implementation": "cuda"}, "implementation must be None or one of 'reference', 'xla', .* got 'cuda'"),
]
BAD_2D = [
    ({"grid": (2, 4)}, r"grid \(2, 4\) holds 8 tokens, but q has T = 6"),
    ({"grid": 6}, r"grid must be \(rows, columns\), two positive integers, got 6"),
    ({"grid": (-2, -3)}, "grid must be .* two positive integers, got"),
    ({"direction": "diagonal"}, "direction must be one of row, row_reversed, .* got 'diagonal'"),
]
BAD_GATED = [
    ({"gate_logits": V}, r"gate_logits has shape \(2, 6, 1, 8\)"),
    ({"out_gate": Q}, r"out_gate has shape \(2, 6, 1, 4\), accepted is .* = \(2, 6, 1, 8\)"),
    ({"norm_weight": jnp.ones(4)}, r"norm_weight has shape \(4,\), accepted is \[V\] = \(8,\)"),
    ({"gate_normalizer": 0}, "gate_normalizer must be a finite Python number > 0, got 0"),
    ({"eps": -1e-6}, "eps must be a finite Python number > 0, got -1e-06"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_argument_is_named_with_what_it_got_and_what_is_accepted(changes, message):
    with pytest.raises(ValueError, match=message):
        gla(**({"q": Q, "k": K, "v": V, "g": G} | changes))


@pytest.mark.parametrize(("changes", "message"), BAD_2D)
def test_bad_grid_is_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        gla_2d(Q, K, V, G, **({"grid": (2, 3)} | changes))


@pytest.mark.parametrize(("changes", "message"), BAD_GATED)
def test_bad_gate_is_explained(changes, message):
    arrays = {"q": Q, "k": K, "v": V, "gate_logits": G, "out_gate": V, "norm_weight": jnp.ones(8)}
    with pytest.raises(ValueError, match=message):
        gated_gla_2d(**(arrays | changes), grid=(2, 3))


def test_plain_implementations_have_no_interpret_mode():
    with pytest.raises(NotImplementedError, match="interpret=True needs a Pallas kernel.* accepted are 'tri"):
        gla(Q, K, V, G, implementation="xla", interpret=True)


def test_default_is_the_chunked_implementation_and_numpy_arrays_are_welcome():
    o = gla(*(np.asarray(x) for x in (Q, K, V, G)))
    assert isinstance(o, jax.Array)
    np.testing.assert_array_equal(o, gla(Q, K, V, G, implementation="xla"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_gla_equals_its_formula(dtype):
    (q, k, v, logits, state), (gate, _) = oracle.inputs(1, t=6, h=2, dtype=dtype)
    weight = jnp.linspace(0.5, 2, v.shape[-1])
    actual = gated_gla_2d(
        q, k, v, logits, gate, weight, grid=(2, 3), gate_normalizer=4, eps=1e-3, initial_state=state
    )
    x, gate = np.asarray(logits, np.float64), np.asarray(gate, np.float64)
    o = oracle.recurrence((q, k, v, -np.logaddexp(0, -x) / 4, state))["o"]
    o /= np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-3)
    expected = o * np.asarray(weight) * gate / (1 + np.exp(-gate))
    assert actual.dtype == dtype
    oracle.assert_close([actual], [expected], 2e-5 if dtype == "float32" else 1e-2, ["out"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g": -G}, "g has positive values"),
        ({"k": K.at[0, 2].set(jnp.nan)}, "k has non-finite values"),
        ({"initial_state": STATE - jnp.inf}, "initial_state has non-finite values"),
    ],
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_debug_mode_finds_bad_values_with_and_without_jit(monkeypatch, changes, message, transform):
    monkeypatch.setenv("PALLAS_GLA_DEBUG", "1")
    arrays = {"q": Q, "k": K, "v": V, "g": G, "initial_state": STATE}
    scan = transform(lambda arrays: gla(**arrays, implementation="reference"))
    scan(arrays).block_until_ready()
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        scan(arrays | changes).block_until_ready()
        jax.effects_barrier()


def test_readme_example_trains():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)
    first, *_, last = names["losses"]
    assert last < first / 10


def test_import_needs_only_jax_and_jaxtyping():
    code = "import sys, pallas_gla; print(*{name.split('.')[0] for name in sys.modules})"
    path = str(pathlib.Path(__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=True)
    assert not {"flax", "dig_jax", "torch", "triton", "beartype"} & set(run.stdout.split())
