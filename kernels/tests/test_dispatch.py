"""Which implementation runs on the platform that a program is compiled for; compilers need no chip."""

import importlib.util
import json
import logging
import pathlib
import subprocess
import sys

import gpu_compiler
import oracle
import pytest
from pallas_gla import dispatch, gla
from pallas_gla.scan import Operands, Scan

(Q, K, V, G, _), _ = oracle.inputs(0, k=32, v=64)
SCAN = Scan(scale=1.0, grid=(1, 20), direction="row")
COMPILE = """
import json, os, re, sys
for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
    os.environ[name] = "1"
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from pallas_gla import gated_gla_2d

platform, topology, target_config = sys.argv[1:4]
options = {"topology_name": topology}
if target_config:
    options = {"topology": topology, "target_config": target_config}
devices = topologies.get_topology_desc(platform=platform, **options).devices
# An axis of size 1 splits nothing, but a kernel cannot be lowered while the partitioner owns the axis.
axes = ("data", "fsdp", "tensor")
mesh = Mesh(np.array(devices[:4]).reshape(2, 1, 2), axes, axis_types=(AxisType.Auto,) * 3)

def loss(q, k, v, logits, gate, weight):
    out = gated_gla_2d(q, k, v, logits, gate, weight, grid=(8, 8), direction="column", chunk_size=16)
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

def array(width):
    sharding = NamedSharding(mesh, P("data", None, "tensor"))
    return jax.ShapeDtypeStruct((4, 64, 8, width), jnp.bfloat16, sharding=sharding)

weight = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, P()))
arrays = [*map(array, (32, 32, 64, 32, 64)), weight]
gradient = jax.jit(jax.grad(loss, argnums=range(6)))
found = {}
for name in ("mesh", "no mesh"):
    with jax.set_mesh(mesh) if name == "mesh" else jax.default_device(jax.devices("cpu")[0]):
        text = gradient.lower(*arrays).compile().as_text()
    collective = r"= (\\S+) (?:all-gather|all-reduce|all-to-all|collective-permute)"
    kernels = re.findall(r'custom_call_target="(tpu_custom_call|__gpu\\$xla.gpu.triton)"', text)
    found[name] = [len(kernels), [shape for shape in re.findall(collective, text) if shape.count(",") > 3]]
print(json.dumps(found))
"""


def test_a_named_kernel_raises_on_other_platforms():
    for implementation, platform in (("triton", "cuda"), ("mosaic", "tpu")):
        with pytest.raises(
            NotImplementedError,
            match=f"{implementation!r} does not run on this platform: got cpu; expected .*{platform}",
        ):
            gla(Q, K, V, G, implementation=implementation)


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_a_named_kernel_raises_with_the_reason(implementation):
    (q, k, v, g, _), _ = oracle.inputs(0, k=8, v=64)
    with pytest.raises(
        NotImplementedError, match=f"{implementation!r} does not support this call: unsupported K: got 8"
    ):
        gla(q, k, v, g, implementation=implementation, interpret=True)


def test_a_named_kernel_whose_packages_are_missing_raises_with_the_package(monkeypatch):
    monkeypatch.setitem(dispatch.KERNELS, ("mosaic", "tpu"), "no_such_package.backend")
    with pytest.raises(
        NotImplementedError, match="'mosaic' cannot be imported: No module named 'no_such_pac"
    ):
        gla(Q, K, V, G, implementation="mosaic", interpret=True)


def test_the_default_is_the_kernel_of_the_platform_or_xla(caplog):
    def chosen(platform, partitioned=False, width=32):
        arrays = (Q[..., :width], K[..., :width], V, G[..., :width])
        operands = Operands(*(x.astype("bfloat16") for x in arrays))
        return dispatch.choose(None, operands, SCAN, platform, partitioned).__name__

    dispatch.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_gla"):
        for _ in range(2):
            assert chosen("tpu") == "pallas_gla.mosaic_tpu.backend"
            assert chosen("cuda") == "pallas_gla.triton.backend"
            assert chosen("cpu") == "pallas_gla.cpu.backend"
            assert chosen("rocm") == "pallas_gla.chunked_xla"
            assert chosen("tpu", partitioned=True) == "pallas_gla.chunked_xla"
            assert chosen("cuda", width=8) == "pallas_gla.chunked_xla"
    assert len(caplog.messages) == 6
    assert "GLA on cpu runs 'cpu'" in caplog.messages
    assert "GLA on rocm runs 'xla': no kernel for rocm" in caplog.messages
    assert "GLA on tpu runs 'mosaic'" in caplog.messages
    assert "GLA on cuda runs 'triton'" in caplog.messages
    assert any("several devices without a mesh" in message for message in caplog.messages)
    assert any("unsupported K: got 8; expected 16 to 128" in message for message in caplog.messages)


def compiled_for(platform: str, topology: str, target_config: str = "") -> dict:
    command = [sys.executable, "-c", COMPILE, platform, topology, target_config]
    path = pathlib.Path(__file__).parents[1]
    run = subprocess.run(command, cwd=path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu, TPU's compiler, is not installed")
def test_a_mesh_of_tpus_runs_the_kernel_per_shard_and_gathers_nothing():
    assert compiled_for("tpu", "v5e:2x2") == {"mesh": [2, []], "no mesh": [0, []]}


def test_gpus_of_a_mesh_run_the_kernel_per_shard_and_gather_nothing():
    if reason := gpu_compiler.missing():
        pytest.skip(reason)
    found = compiled_for("cuda", "1x1x8", gpu_compiler.target("sm_90a"))
    (kernels, gathered), without_mesh = found["mesh"], found["no mesh"]
    assert kernels >= 2 and not gathered
    assert without_mesh == [0, []]
