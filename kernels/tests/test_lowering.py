"""Programs that are lowered and exported without the chip, under any of JAX's global settings."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from pallas_gla import gated_gla_2d, gla, gla_2d

# What identifies a kernel in a lowered program. A CPU has none.
KERNEL = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
SETTINGS = {
    "64-bit": {"jax_enable_x64": True},
    "strict": {
        "jax_numpy_rank_promotion": "raise",
        "jax_numpy_dtype_promotion": "strict",
        "jax_default_matmul_precision": "bfloat16",
    },
}


def loss(q, k, v, g, gates, state, ids, *, direction):
    """Reach every result of a plain scan or, with gates, of a gated scan."""
    options = {"grid": (16, 8), "direction": direction, "segment_ids": ids, "return_final_state": True}
    scan = gated_gla_2d if gates else gla_2d
    o, final_state = scan(q, k, v, g, *gates, initial_state=state, **options)
    return o.astype(jnp.float32).sum() + final_state.sum()


def arrays(dtype, gated, segmented=True):
    """Return the types of a scan's arrays: B = 2, T = 128, H = 2, K = 32, V = 64."""
    narrow, wide = (jax.ShapeDtypeStruct((2, 128, 2, width), dtype) for width in (32, 64))
    gates = (wide, jax.ShapeDtypeStruct((64,), jnp.float32)) if gated else ()
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32) if segmented else None
    return narrow, narrow, wide, narrow, gates, jax.ShapeDtypeStruct((2, 2, 32, 64), jnp.float32), ids


def on_v5e():
    """Name the chip of programs that are lowered without one."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


SCANS = [
    ("float32", False, "column_reversed"),
    ("bfloat16", True, "column"),
    ("float32", True, "row_reversed"),
]


def latin_square():
    """Parametrize over all cases; the fast ones try all settings on each platform and with each scan."""
    cases = itertools.product(enumerate(SETTINGS), enumerate(["cpu", "cuda", "tpu"]), enumerate(SCANS))
    return [
        pytest.param(settings, platform, *scan, marks=() if (i + j + k) % 3 == 0 else pytest.mark.slow)
        for (i, settings), (j, platform), (k, scan) in cases
    ]


@pytest.mark.parametrize(
    ("settings", "platform", "dtype", "gated", "direction"), latin_square(), indirect=["settings"]
)
def test_lowers_under_any_settings_of_jax(settings, platform, dtype, gated, direction):
    gradient = jax.value_and_grad(functools.partial(loss, direction=direction), argnums=range(6))
    with on_v5e() if platform == "tpu" else contextlib.nullcontext():
        traced = jax.jit(gradient).trace(*arrays(dtype, gated))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert platform == "cpu" or text.count(KERNEL[platform]) >= 2


def test_an_unknown_tpu_runs_the_kernel_only_in_bfloat16_because_of_v4():
    def runs_kernel(dtype):
        traced = jax.jit(gla).trace(*arrays(dtype, gated=False)[:4])
        return KERNEL["tpu"] in traced.lower(lowering_platforms=("tpu",)).as_text()

    assert [runs_kernel(dtype) for dtype in ("bfloat16", "float32")] == [True, False]
    with on_v5e():
        assert runs_kernel("float32")


def exported(function, platform, *arrays):
    # JAX does not promise that a stored Triton kernel runs on later versions.
    checks = [jax.export.DisabledSafetyCheck.custom_call(KERNEL["cuda"])]
    return jax.export.export(jax.jit(function), platforms=(platform,), disabled_checks=checks)(*arrays)


@pytest.mark.parametrize(
    ("platform", "shape"),
    [
        ("cpu", "b, 20, h, 16"),
        ("cuda", "b, 20, 1, 16"),
        ("tpu", "b, 20, h, 16"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("cuda", "b, 20, h, 16"), ("rocm", "b, 20, 1, 16"), ("tpu", "b, 20, 1, 16")]
        ),
    ],
)
def test_a_symbolic_batch_or_number_of_heads_runs_plain_jax_on_every_platform(platform, shape):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)

    def gradient(x):
        return jax.grad(lambda x: gla(x, x, x, -x * x).sum())(x)

    program = exported(gradient, platform, x)
    assert not any(kernel in program.mlir_module() for kernel in KERNEL.values())
    if platform == "cpu":
        x = jnp.linspace(-1, 1, 3 * 20 * 16).reshape(3, 20, 1, 16)
        oracle.assert_close([program.call(x)], [gradient(x)], 1e-6, ["dx"])


def test_a_program_with_a_symbolic_batch_has_the_same_bits_on_a_cpu():
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 80, 1, 128"), jnp.float32)

    def scan(x):
        return gla(x, x, x, -x * x)

    x = jax.random.normal(jax.random.key(0), (2, 80, 1, 128))
    np.testing.assert_array_equal(exported(scan, "cpu", symbolic).call(x), jax.jit(scan)(x))


def test_a_kernel_that_is_named_or_a_symbolic_length_raises():
    batch, length = (
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
        for shape in ("b, 20, 1, 16", "1, t, 1, 16")
    )
    with pytest.raises(NotImplementedError, match=r"got the symbols \(b, 20, 1, 16\); expected numbers"):
        exported(lambda x: gla(x, x, x, -x * x, implementation="mosaic"), "tpu", batch)
    with pytest.raises(ValueError, match="invalid T: got the symbol t; expected a number"):
        exported(lambda x: gla(x, x, x, -x * x), "cpu", length)


def test_an_exported_program_has_the_kernel_of_each_platform():
    narrow, _, wide, *_ = arrays("bfloat16", gated=False)
    platforms = ("cpu", "cuda", "tpu")
    checks = [jax.export.DisabledSafetyCheck.custom_call(KERNEL["cuda"])]
    program = jax.export.export(jax.jit(gla), platforms=platforms, disabled_checks=checks)
    module = program(narrow, narrow, wide, narrow).mlir_module()
    assert all(kernel in module for kernel in KERNEL.values())
    with pytest.raises(ValueError, match=r"custom calls .*compatibility guarantees"):
        jax.export.export(jax.jit(gla), platforms=platforms)(narrow, narrow, wide, narrow)
