import functools
import re

import jax
import jax.numpy as jnp
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from pallas_gla import gla, gla_2d
from pallas_gla.mosaic_tpu import tuning
from test_chunked_xla import TestChunkedXla as ChunkedXla


class TestDefault(ChunkedXla):
    """On a CPU the default runs `pallas_gla.cpu`."""

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


@pytest.mark.parametrize(("platform", "call"), [("cuda", "xla.gpu.triton"), ("tpu", "tpu_custom_call")])
@pytest.mark.parametrize(
    ("moving", "derivative", "calls"),
    [
        ("qkvg", "forward", 2),
        ("v", "forward", 2),
        # The output and the tangent, a scan with keys of 2K and one with v_dot, and a backward pass for each.
        ("qkvg", "reverse over forward", None),
    ],
)
def test_derivatives_run_kernels_and_no_loop_over_chunks(
    platform, call, moving, derivative, calls, monkeypatch
):
    # Float32 scans, which reverse over forward takes, need more memory than an unknown TPU may have.
    monkeypatch.setattr(tuning, "ANY_TPU", tuning.BLOCKS["TPU v5 lite"])
    keys, values = (jax.ShapeDtypeStruct((1, 256, 2, n), jnp.bfloat16) for n in (32, 64))
    arrays = dict(zip("qkvg", (keys, keys, values, keys), strict=True))

    def forward(arrays, dots):
        return jax.jvp(lambda moved: gla(**arrays | moved), ({x: arrays[x] for x in moving},), (dots,))

    def loss(arrays, dots):
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in forward(arrays, dots))

    function = forward if derivative == "forward" else jax.grad(loss, (0, 1))
    traced = jax.jit(function).trace(arrays, {x: arrays[x] for x in moving})
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" not in text and "stablehlo.dot" not in text
    assert calls is None or text.count(call) == calls
    assert text.count(call) >= 2
    assert moving == "qkvg" or "gla_tangent" not in text


@pytest.mark.parametrize("direction", ["row_reversed", "column"])
def test_tangents_of_a_scan_over_several_devices_match_those_of_one(direction):
    arrays, _ = oracle.inputs(2, t=64, h=2, k=8, v=8)
    dots, _ = oracle.inputs(3, t=64, h=2, k=8, v=8)
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    tokens = P(None, "context")

    def scan(*arrays, **options):
        *tokens, state = arrays
        options |= {"direction": direction, "initial_state": state, "return_final_state": True}
        return gla_2d(*tokens, **options)

    split = functools.partial(scan, grid=(2, 8), axis_name="context")
    split = jax.shard_map(split, mesh=mesh, in_specs=(*[tokens] * 4, P()), out_specs=(tokens, P()))
    whole = functools.partial(scan, grid=(8, 8), implementation="reference")
    actual, expected = (jax.jit(lambda x, t, f=f: jax.jvp(f, x, t)[1])(arrays, dots) for f in (split, whole))
    oracle.assert_close(actual, expected, 1e-5, oracle.NAMES[:2])
