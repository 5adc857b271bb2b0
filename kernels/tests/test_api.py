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
    ({"q": None}, r"invalid q: got NoneType; expected a nonempty array \[B, T, H, K\]"),
    ({"q": Q[0]}, r"invalid q: got shape \(6, 1, 4\); expected a nonempty array \[B, T, H, K\]"),
    ({"q": EMPTY, "k": EMPTY, "g": EMPTY}, r"invalid q: got shape \(2, 0, 1, 4\); expected a nonempty"),
    ({"q": np.zeros((2, 6, 1, 4))}, "dtype of q: got float64; expected bfloat16, float16 or float32"),
    ({"q": Q.astype(jnp.int32)}, "invalid dtype of q: got int32; expected"),
    ({"k": K[:, :5]}, r"shape of k: got \(2, 5, 1, 4\); expected \[B, T, H, K\] = \(2, 6, 1, 4\)"),
    ({"k": K.astype(jnp.bfloat16)}, "invalid dtype of k: got bfloat16; expected float32"),
    ({"v": V[:1]}, r"shape of v: got \(1, 6, 1, 8\); expected \[B, T, H, V\] = \(2, 6, 1, 8\)"),
    ({"v": V.astype(jnp.float16)}, "invalid dtype of v: got float16; expected float32"),
    ({"g": V}, r"shape of g: got \(2, 6, 1, 8\); expected \[B, T, H, K\] = \(2, 6, 1, 4\)"),
    ({"g": G.astype(jnp.bfloat16)}, "invalid dtype of g: got bfloat16; expected float32"),
    ({"scale": "big"}, r"invalid scale: got 'big'; expected None, a finite number, or a real array \[\] or"),
    ({"scale": float("nan")}, "invalid scale: got nan; expected None, a finite number, or a real array"),
    ({"scale": jnp.ones(3)}, r"invalid scale: got an array \(3,\) of float32; expected None, a finite"),
    ({"scale": np.array(True)}, r"invalid scale: got an array \(\) of bool; expected None, a finite"),
    (
        {"initial_state": STATE[0]},
        r"initial_state: got \(1, 4, 8\); expected \[B, H, K, V\] = \(2, 1, 4, 8\)",
    ),
    ({"initial_state": STATE.astype(jnp.float16)}, "dtype of initial_state: got float16; expected float32"),
    ({"segment_ids": jnp.zeros((2, 6))}, "dtype of segment_ids: got float32; expected int32, int8"),
    ({"segment_ids": jnp.zeros(6, int)}, r"shape of segment_ids: got \(6,\); expected \[B, T\] = \(2, 6\)"),
    ({"segment_ids": [0] * 6}, r"invalid segment_ids: got list; expected an array \[B, T\]"),
    ({"chunk_size": 8}, "invalid chunk_size: got 8; expected a power of two >= 16, or None"),
    ({"chunk_size": 48}, "invalid chunk_size: got 48; expected a power of two >= 16, or None"),
    (
        {"implementation": "cuda"},
        "implementation: got 'cuda'; expected None, 'reference', 'xla', 'triton' or",
    ),
]
BAD_2D = [
    ({"grid": (2, 4)}, r"invalid grid: got \(2, 4\), 8 tokens; expected T = 6 tokens"),
    ({"grid": 6}, r"invalid grid: got 6; expected \(rows, columns\), two positive integers"),
    ({"grid": (-2, -3)}, r"invalid grid: got \(-2, -3\); expected .* two positive integers"),
    ({"direction": "diagonal"}, "direction: got 'diagonal'; expected row, row_reversed, column or column_re"),
]
BAD_GATED = [
    ({"gate_logits": V}, r"invalid shape of gate_logits: got \(2, 6, 1, 8\)"),
    ({"out_gate": Q}, r"shape of out_gate: got \(2, 6, 1, 4\); expected \[B, T, H, V\] = \(2, 6, 1, 8\)"),
    ({"norm_weight": jnp.ones(4)}, r"shape of norm_weight: got \(4,\); expected \[V\] = \(8,\)"),
    ({"gate_normalizer": 0}, "invalid gate_normalizer: got 0; expected a finite Python number > 0"),
    ({"eps": -1e-6}, "invalid eps: got -1e-06; expected a finite Python number > 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_an_invalid_argument_is_named_with_its_value_and_what_is_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        gla(**({"q": Q, "k": K, "v": V, "g": G} | changes))


@pytest.mark.parametrize(("changes", "message"), BAD_2D)
def test_an_invalid_grid_or_direction_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        gla_2d(Q, K, V, G, **({"grid": (2, 3)} | changes))


@pytest.mark.parametrize(("changes", "message"), BAD_GATED)
def test_an_invalid_gate_raises(changes, message):
    arrays = {"q": Q, "k": K, "v": V, "gate_logits": G, "out_gate": V, "norm_weight": jnp.ones(8)}
    with pytest.raises(ValueError, match=message):
        gated_gla_2d(**(arrays | changes), grid=(2, 3))


def test_plain_implementations_have_no_interpret_mode():
    with pytest.raises(
        NotImplementedError, match="requires a Pallas kernel: got implementation='xla'; expec"
    ):
        gla(Q, K, V, G, implementation="xla", interpret=True)


def test_numpy_arrays_are_accepted():
    o = gla(*(np.asarray(x) for x in (Q, K, V, G)))
    assert isinstance(o, jax.Array)
    np.testing.assert_array_equal(o, gla(Q, K, V, G))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gated_gla_matches_the_oracle(dtype):
    (q, k, v, logits, state), (gate, _) = oracle.inputs(1, t=6, h=2, dtype=dtype)
    weight = jnp.linspace(0.5, 2, v.shape[-1])
    options = {"grid": (2, 3), "direction": "row"}
    gating = {"gate_normalizer": 4, "eps": 1e-3}
    actual = gated_gla_2d(q, k, v, logits, gate, weight, initial_state=state, **options, **gating)
    gates, arrays = (gate, weight), (q, k, v, logits, state)
    expected = oracle.gated_recurrence(arrays, gates, normalizer=4, eps=1e-3, **options)["o"]
    assert actual.dtype == dtype
    oracle.assert_close([actual], [expected], 2e-5 if dtype == "float32" else 1e-2, ["out"])


def test_a_scale_may_be_traced_and_has_a_gradient_per_head():
    (q, k, v, g, state), (d_out, d_state) = oracle.inputs(2, t=6, h=2)

    @jax.jit
    def results(scale):
        def scan(scale):
            return gla(q, k, v, g, scale=scale, initial_state=state, return_final_state=True)

        out, vjp = jax.vjp(scan, scale)
        return out, vjp((d_out, d_state))[0]

    scale = jnp.array([0.5, -2.0])
    expected = oracle.recurrence((q, k, v, g, state), scale=1.0)
    unscaled = np.asarray(expected["o"])
    by_head = np.sum(unscaled * np.float64(d_out), axis=(0, 1, 3))
    (o, final_state), gradient = results(scale)
    wanted = [unscaled * np.float64(scale)[:, None], expected["final_state"], by_head]
    oracle.assert_close([o, final_state, gradient], wanted, 2e-5, ["o", "final_state", "dscale"])
    (o, _), gradient = results(jnp.float32(0.5))
    oracle.assert_close([o, gradient], [unscaled * 0.5, by_head.sum()], 2e-5, ["o", "dscale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g": -G}, "g has positive values; expected a log decay <= 0"),
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
    code = "import sys, jax, jaxtyping; before = set(sys.modules); import pallas_gla; "
    code += "print(*{name.split('.')[0] for name in sys.modules.keys() - before})"
    path = str(pathlib.Path(__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) - sys.stdlib_module_names <= {"pallas_gla", "jax", "jaxlib", "numpy"}
