"""The selective scan against a float64 recurrence."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import gpu_compiler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scan_oracle
import static_selective_scan
from pallas_gla.selective_scan import selective_scan

# Tokens: a whole chunk, several with a remainder, and less than one.
SHAPES = {"one chunk": (2, 64, 8), "remainder": (1, 130, 8), "short": (2, 3, 8)}


def cotangents(arrays):
    rng = np.random.default_rng(1)
    d_y, d_state = (rng.standard_normal(arrays[name].shape) for name in ("x", "initial_state"))
    return d_y.astype(np.float32), d_state.astype(np.float32)


def error(got, expected):
    return np.max(np.abs(np.asarray(got, np.float64) - expected)) / max(np.max(np.abs(expected)), 1e-30)


@functools.partial(jax.jit, static_argnames=("reverse", "implementation", "interpret"))
def values_and_gradients(arrays, d, reverse, **options):
    def run(arrays):
        return selective_scan(**arrays, reverse=reverse, return_final_state=True, **options)

    values, vjp = jax.vjp(run, arrays)
    return values, vjp(d)[0]


def check(arrays, reverse=False, run=values_and_gradients, gated=True, tolerance=1e-5):
    d = cotangents(arrays)
    given = arrays if gated else {name: x for name, x in arrays.items() if name != "z"}
    values, gradients = run(given, d, reverse)
    if not gated:
        # SiLU(50) = 50, so a gate of 50 multiplies the output by 50.
        arrays = arrays | {"z": np.full_like(arrays["z"], 50.0)}
        values, d = (50 * values[0], values[1]), (d[0] / 50, d[1])
    for got, expected in zip(values, scan_oracle.run(**arrays, reverse=reverse), strict=True):
        assert error(got, expected) < tolerance
    expected = scan_oracle.gradients(**arrays, d_y=d[0], d_final_state=d[1], reverse=reverse)
    errors = {name: error(gradients[name], expected[name]) for name in given}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize(("shape", "reverse"), [("one chunk", True), ("remainder", False), ("short", True)])
def test_values_and_gradients_match_the_recurrence(shape, reverse):
    check(scan_oracle.inputs(*SHAPES[shape]), reverse)


@pytest.mark.parametrize("step", [0.0, 1e-7, 30.0])
def test_extreme_step_sizes_are_accurate(step):
    check(scan_oracle.inputs(*SHAPES["remainder"], step=step))


def test_the_oracle_has_the_gradients_of_its_values():
    arrays = {name: x.astype(np.float64) for name, x in scan_oracle.inputs(1, 3, 2, 4).items()}
    d_y, d_state = cotangents(arrays)
    gradients = scan_oracle.gradients(**arrays, d_y=d_y, d_final_state=d_state)
    rng = np.random.default_rng(2)
    for name, x in arrays.items():
        change = 1e-6 * rng.standard_normal(x.shape)

        def loss(x, name=name):
            y, state = scan_oracle.run(**arrays | {name: x})
            return np.sum(y * d_y) + np.sum(state * d_state)

        slope = loss(x + change) - loss(x - change)
        assert slope == pytest.approx(2 * np.sum(gradients[name] * change), rel=1e-6), name


def test_a_reversed_scan_equals_a_scan_of_flipped_tokens():
    arrays = scan_oracle.inputs(*SHAPES["remainder"])
    flipped = {name: np.flip(x, 1) if name in ("x", "dt", "B", "C", "z") else x for name, x in arrays.items()}
    y, state = selective_scan(**flipped, return_final_state=True)
    reversed_y, reversed_state = selective_scan(**arrays, reverse=True, return_final_state=True)
    np.testing.assert_allclose(reversed_y, y[:, ::-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reversed_state, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fixed", "options"),
    [
        (("A", "D", "C"), {}),
        ((), {}),
        pytest.param(
            ("A", "D"), {"implementation": "mosaic", "interpret": True}, marks=pytest.mark.slow, id="mosaic"
        ),
    ],
)
def test_vmap_equals_a_loop_in_values_and_gradients(fixed, options):
    examples = [scan_oracle.inputs(2, 3, 8, seed=seed) for seed in (0, 1, 2)]
    shared = {name: examples[0][name] for name in fixed}
    examples = [arrays | shared for arrays in examples]
    stacked = {name: np.stack([x[name] for x in examples]) for name in examples[0]} | shared
    d = [cotangents(arrays) for arrays in examples]

    @jax.jit
    def run(arrays, d):
        axes = {name: None if name in fixed else 1 for name in arrays}
        arrays = {name: x if name in fixed else jnp.moveaxis(x, 0, 1) for name, x in arrays.items()}
        function = functools.partial(values_and_gradients, reverse=False, **options)
        return jax.vmap(function, (axes, 0))(arrays, d)

    values, gradients = run(stacked, tuple(np.stack(x) for x in zip(*d, strict=True)))
    for i, arrays in enumerate(examples):
        for got, expected in zip(values, scan_oracle.run(**arrays), strict=True):
            assert error(got[i], expected) < 1e-5
        expected = scan_oracle.gradients(**arrays, d_y=d[i][0], d_final_state=d[i][1])
        errors = {name: error(x[i], expected[name]) for name, x in gradients.items()}
        assert max(errors.values()) < 1e-5, errors


def test_forward_mode_agrees_with_reverse_mode():
    arrays = scan_oracle.inputs(*SHAPES["short"])
    d_y, d_state = cotangents(arrays)
    run = functools.partial(selective_scan, implementation="xla", return_final_state=True)
    dots = {name: np.ones_like(x) for name, x in arrays.items()}
    (y_dot, state_dot) = jax.jvp(lambda arrays: run(**arrays), (arrays,), (dots,))[1]
    gradients = scan_oracle.gradients(**arrays, d_y=d_y, d_final_state=d_state)
    forward = np.sum(y_dot * d_y) + np.sum(state_dot * d_state)
    assert forward == pytest.approx(sum(x.sum() for x in gradients.values()), rel=1e-4)


def test_without_a_gate_and_a_state_the_scan_is_the_plain_recurrence():
    arrays = scan_oracle.inputs(*SHAPES["short"])
    z = np.full_like(arrays["z"], 50.0)  # SiLU(50) = 50
    expected = scan_oracle.run(**arrays | {"z": z, "initial_state": 0 * arrays["initial_state"]})[0] / 50
    plain = {name: x for name, x in arrays.items() if name not in ("z", "initial_state")}
    assert error(selective_scan(**plain), expected) < 1e-5


def test_16_bit_tokens_keep_a_float32_state():
    arrays = scan_oracle.inputs(*SHAPES["remainder"])
    for name in ("x", "z"):
        arrays[name] = arrays[name].astype(jnp.bfloat16)
    y, state = selective_scan(**arrays, return_final_state=True)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert error(state, scan_oracle.run(**arrays)[1]) < 1e-5


def test_a_training_step_never_holds_the_states_of_all_tokens():
    tokens, channels, states = 1024, 32, 16
    arrays = {name: jnp.asarray(x) for name, x in scan_oracle.inputs(1, tokens, channels, states).items()}
    gradient = jax.jit(jax.grad(lambda arrays: jnp.sum(selective_scan(**arrays))))
    analysis = gradient.lower(arrays).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 4 * tokens * channels * states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3))}, r"invalid x: got shape \(2, 3\); expected a nonempty array \[B, T, chan"),
        ({"B": np.zeros((2, 3, 5), np.float32)}, r"invalid shape of B: got \(2, 3, 5\); expected .*2, 3, 16"),
        ({"dt": np.zeros((2, 3, 8), np.int32)}, "invalid dtype of dt: got int32; expected float32"),
        ({"implementation": "cuda"}, "invalid implementation: got 'cuda'; expected"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**scan_oracle.inputs(*SHAPES["short"]) | change)


@pytest.mark.parametrize(
    ("implementation", "shape", "reverse", "gated"),
    [
        ("mosaic", (1, 67, 136), False, True),
        pytest.param("mosaic", (1, 130, 8), True, False, marks=pytest.mark.slow),
        pytest.param("triton", (2, 67, 40), False, True, marks=pytest.mark.slow),
        ("triton", (1, 67, 40), True, False),
    ],
)
def test_kernels_match_the_recurrence(implementation, shape, reverse, gated):
    arrays = scan_oracle.inputs(*shape)
    run = functools.partial(values_and_gradients, implementation=implementation, interpret=True)
    check(arrays, reverse, run=run, gated=gated)


SETTINGS = {
    "default": {},
    "64-bit": {"jax_enable_x64": True},
    "strict": {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"},
}


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize(
    "settings",
    [pytest.param(name, marks=pytest.mark.slow if SETTINGS[name] else ()) for name in SETTINGS],
    indirect=True,
)
def test_a_program_for_a_chip_has_its_kernel_and_others_have_plain_jax():
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in scan_oracle.inputs(1, 8, 8).items()}
    gradient = jax.jit(jax.grad(lambda arrays: selective_scan(**arrays).sum())).trace(shapes)
    kernels = {"cpu": [], "tpu": ["tpu_custom_call"] * 2, "cuda": ["__gpu$xla.gpu.triton"] * 2}
    for platform, expected in kernels.items():
        text = gradient.lower(lowering_platforms=(platform,)).as_text()
        assert re.findall(r"custom_call @([\w$.]+)", text) == expected, platform


def test_a_kernel_that_is_named_for_another_platform_raises():
    with pytest.raises(
        NotImplementedError, match="implementation='mosaic': got cpu; expected tpu, or interpret"
    ):
        selective_scan(**scan_oracle.inputs(*SHAPES["short"]), implementation="mosaic")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e", "sm_90a"])
def test_kernels_compile_without_spills_and_move_little_more_than_the_least_bytes(chip):
    """In a new process, because libtpu reads its environment at the start."""
    if chip.startswith("sm") and gpu_compiler.missing() is not None:
        pytest.skip(str(gpu_compiler.missing()))
    if chip.startswith("v"):
        pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
    command = [sys.executable, str(pathlib.Path(static_selective_scan.__file__)), "--json", "--chips", chip]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    measured = json.loads(found.stdout.splitlines()[-1])
    assert measured
    for kind, figures in measured.items():
        assert figures["spills"] == 0, kind
        assert figures["bytes_to_minimum"] < 1.3, kind
