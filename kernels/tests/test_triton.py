"""The Triton kernels in interpret mode; `test_triton_code` tests the code that Triton generates."""

import functools

import jax
import jax.numpy as jnp
import oracle
import pytest
from gla_test_base import SIZES, GLATestBase
from pallas_gla.scan import Gating, Operands, Scan
from pallas_gla.triton import backend, tuning
from range_tests import NonFiniteTests
from triton_cases import (
    COVERING,
    DIRECTIONS,
    GATED_PRODUCT,
    PRODUCT,
    check,
    check_gated,
    check_irregular,
    check_product,
    check_uneven,
    interpreted,
    segments,
)


class TestTriton(NonFiniteTests, GLATestBase):
    implementation = "triton"
    interpret = jax.default_backend() != "gpu"

    # COVERING has more sizes.
    @pytest.mark.parametrize("size", SIZES[-1:], ids=str)
    def test_values_and_gradients_match_the_oracle(self, size):
        super().test_values_and_gradients_match_the_oracle(size)


# `test_triton_code` runs the 16-bit cases.
@pytest.mark.parametrize("case", [case for case in COVERING if case[3] == "float32"], ids=str)
def test_values_and_gradients_match_the_oracle(case):
    check(interpreted, *case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decay_gradient_of_every_channel_and_token_is_accurate(dtype):
    check_uneven(interpreted, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinities_do_not_reach_earlier_tokens_or_other_segments_in_16_bits(value):
    check_irregular(interpreted, "bfloat16", value)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), list(enumerate(PRODUCT)), ids=str)
def test_product_of_sizes_dtypes_and_gates_in_changing_directions(number, case):
    check_product(interpreted, number, case)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "case"), list(enumerate(GATED_PRODUCT)), ids=str)
def test_product_of_gated_scans_with_the_gates_of_dig(number, case):
    grid, widths, dtype = case
    segmented = number % 5 < 2
    # Where a segment begins, o remembers a single key and its norm may be tiny; a large eps bounds the error.
    gating = Gating(16.0, 1.0 if segmented else 1e-6)
    tolerance = 7e-3 if dtype != "float32" and grid == (3, 5) else None
    options = {"batch": 1, "gating": gating, "tolerance": tolerance}
    check_gated(interpreted, grid, *widths, dtype, DIRECTIONS[number % 4], segmented, (0.25, 1.0), **options)
    jax.clear_caches()


def test_kernels_have_no_64_bit_types_with_x64_enabled():
    with jax.enable_x64(True):
        arrays, cotangents = oracle.inputs(0, t=20, h=2, k=16, v=32, dtype="bfloat16")
        operands = Operands(*arrays[:4], initial_state=arrays[4], segment_ids=jnp.asarray(segments(2, 20)))
        scan = Scan(0.25, (4, 5), "column")
        jaxpr = jax.make_jaxpr(functools.partial(interpreted, scan=scan))(operands, cotangents)
        assert "f64" not in str(jaxpr)
        assert "i64" not in str(jaxpr)


def test_chunks_may_be_shorter():
    arrays, cotangents = oracle.inputs(1, t=40, h=1, k=16, v=16)
    scan = Scan(0.25, (1, 40), "row", chunk_size=16)
    (o, final_state), d = interpreted(Operands(*arrays[:4], initial_state=arrays[4]), cotangents, scan)
    actual = [o, final_state, d.q, d.k, d.v, d.g, d.initial_state]
    oracle.assert_close(actual, oracle.recurrence(arrays, cotangents).values(), 1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 8}, "unsupported K: got 8; expected 16 to 128"),
        ({"v": 256}, "unsupported V: got 256; expected 16 to 128"),
        (
            {"dtype": "float8_e4m3fn"},
            "unsupported dtype of v: got float8_e4m3fn; expected bfloat16, float16 or float32",
        ),
        ({"chunk_size": 8}, "unsupported chunk_size: got 8; expected None or a power of two >= 16"),
        ({}, None),
    ],
)
def test_unsupported_gives_the_reason(change, reason):
    options = {"k": 32, "v": 64, "dtype": "bfloat16", "chunk_size": None} | change
    keys, values = (jax.ShapeDtypeStruct((1, 20, 2, options[name]), options["dtype"]) for name in ("k", "v"))
    scan = Scan(1.0, (1, 20), "row", options["chunk_size"])
    assert backend.unsupported(Operands(keys, keys, values, keys), scan) == reason


def test_lowers_for_a_gpu_without_a_gpu_or_a_warning():
    arrays, _ = oracle.inputs(0, t=64, h=2, k=32, v=64, dtype="bfloat16")
    scan = Scan(0.2, (8, 8), "column")
    forward = jax.jit(lambda *arrays: backend.forward(Operands(*arrays), scan, save=False)[0])
    assert "triton" in forward.trace(*arrays[:4]).lower(lowering_platforms=("cuda",)).as_text()


def test_long_scans_of_few_heads_are_split():
    h200 = tuning.gpu("NVIDIA H200")
    assert [h200.part_chunks(18 * batch, 16) for batch in (32, 1)] == [16, 16]
    assert h200.part_chunks(18, 256) == 19
    assert h200.part_chunks(18 * 8, 64) == 8
    # Fewer than 8 parts would not pay for the second pass; nor does a split with two programs per core.
    assert (h200.part_chunks(18 * 8, 32), h200.part_chunks(18 * 16, 256)) == (32, 256)


def test_float32_gradients_take_several_launches_only_before_sm_90():
    h200, a100, other = (tuning.gpu(kind) for kind in ("NVIDIA H200", "NVIDIA A100", None))
    assert (h200.float32_values, a100.float32_values, other.float32_values) == (128, 32, 32)
    arrays, cotangents = oracle.inputs(0, t=20, h=1, k=16, v=60)
    run = functools.partial(interpreted, scan=Scan(0.25, (1, 20), "row"))
    program = str(jax.make_jaxpr(run)(Operands(*arrays[:4]), cotangents))
    assert program.count("gla_triton_call") == 3  # one of them forward


def test_as_many_stages_as_tiles_fit_into_shared_memory():
    h200, other = tuning.gpu("NVIDIA H200"), tuning.gpu("NVIDIA L4")
    assert other == tuning.gpu(None)
    assert (h200.num_stages(32 * 64, 2), other.num_stages(32 * 64, 2)) == (3, 2)
    assert (h200.num_stages(64 * 128, 2), other.num_stages(64 * 64, 2)) == (2, 1)
    assert h200.num_stages(128 * 128, 2) == h200.num_stages(16 * 16, 4) == 1
