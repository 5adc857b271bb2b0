"""The default on every kind of chip, lowered and compiled without the chip."""

import functools
import importlib.util
import logging
import os

import gpu_compiler
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gla import dispatch, gated_gla_2d, gla

# Read by libtpu when it is loaded.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
TPUS = {name.split(":")[0]: name for name in ("v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1")}
TPUS |= {name.split(":")[0]: name for name in ("v6e:2x2", "tpu7x:2x2x1")}
GPUS = ("sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
WITHOUT_KERNEL = ("sm_60", "sm_70", "sm_75", "v2", "v3")
ONLY_BFLOAT16 = ("v4",)
KERNELS = ("__gpu$xla.gpu.triton", "tpu_custom_call")


@functools.cache
def sharding(chip):
    """Return a sharding on one chip of this kind."""
    if chip in GPUS:
        if reason := gpu_compiler.missing():
            pytest.skip(reason)
        return gpu_compiler.sharding(chip)
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu, TPU's compiler, is not installed")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip]).devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("chip",)), P())


def lowered(chip, dtype, gated=False, widths=(32, 64), heads=1, side=8):
    """Return the lowered gradient of a scan of side * side tokens, gated scans in columns."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(chip))

    def loss(q, k, v, g, *gates):
        grid = {"grid": (side, side), "direction": "column_reversed"}
        o = gated_gla_2d(q, k, v, g, *gates, **grid) if gated else gla(q, k, v, g)
        return o.astype(jnp.float32).sum()

    key, value = widths
    arrays = [array(1, side**2, heads, width) for width in (key, key, value, key)]
    arrays += [array(1, side**2, heads, value), array(value)] if gated else []
    return jax.jit(jax.grad(loss, argnums=range(len(arrays)))).lower(*arrays)


# The boundaries, and each maker's newest chip.
@pytest.mark.parametrize(
    "chip",
    [
        chip
        if chip in ("sm_75", "sm_80", "sm_120", "v3", "tpu7x")
        else pytest.param(chip, marks=pytest.mark.slow)
        for chip in [*GPUS, *TPUS]
    ],
)
def test_the_default_is_the_kernel_if_the_chip_runs_it_and_else_plain_jax_with_one_line(chip, caplog):
    for dtype in ("bfloat16", "float16", "float32"):
        dispatch.log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "pallas_gla"):
            text = lowered(chip, dtype).as_text()
        plain = chip in WITHOUT_KERNEL or (chip in ONLY_BFLOAT16 and dtype != "bfloat16")
        assert any(kernel in text for kernel in KERNELS) != plain
        [message] = caplog.messages
        assert ("runs 'xla': unsupported" in message) == plain
        [device] = sharding(chip).device_set
        assert not plain or device.device_kind in message


def test_a_named_kernel_raises_where_the_chip_does_not_run_it():
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16, sharding=sharding("sm_75"))
    for implementation, expected in (("triton", "expected sm_80"), ("mosaic", "expected sm_90a")):
        scan = functools.partial(gla, implementation=implementation)
        with pytest.raises(NotImplementedError, match=rf"got Tesla T4 \(sm_75\); {expected}"):
            jax.jit(scan).lower(x, x, x, x)


def compiles(*arguments, **options):
    assert lowered(*arguments, **options).compile().as_text()


@pytest.mark.parametrize(("chip", "dtype"), [("sm_75", "bfloat16"), ("v6e", "float16")])
def test_the_default_compiles(chip, dtype):
    compiles(chip, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("chip", [*GPUS, *TPUS])
def test_the_default_compiles_on_every_chip(chip, dtype, gated):
    compiles(chip, dtype, gated)


@pytest.mark.parametrize(
    "chip", ["sm_80", "sm_120", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("sm_86", "sm_89"))]
)
def test_heads_that_exceed_the_shared_memory_of_a_small_gpu_run_plain_jax(chip):
    found = [KERNELS[0] in lowered(chip, "bfloat16", True, (128, v)).as_text() for v in (64, 65)]
    assert found == [True, chip == "sm_80"]


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(128, 128), (64, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("chip", ["sm_80", "sm_86", "sm_120"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wide_heads_fit_the_shared_memory_or_run_plain_jax(chip, dtype, widths):
    compiles(chip, dtype, gated=True, widths=widths)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "heads"), [((64, 128), 16), ((32, 64), 18), ((128, 128), 16)], ids=str)
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_wide_heads_fit_the_vmem_or_run_plain_jax(chip, dtype, widths, heads):
    compiles(chip, dtype, gated=True, widths=widths, heads=heads, side=16)
