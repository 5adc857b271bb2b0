import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tiny_components import tiny_settings

from configs import dig_s, dig_xl
from dig_jax import config
from dig_jax.components import Components
from dig_jax.errors import ConfigError, UserError
from dig_jax.hardware.chips import CHIPS, chip_of_kind
from dig_jax.hardware.hlo_collectives import Collective
from dig_jax.hardware.hlo_cost import Counts, count
from dig_jax.hardware.model_flops import forward_flops, training_flops
from dig_jax.hardware.roofline import roofline
from dig_jax.planning import plan, topology
from dig_jax.planning.compiling import compiled, optimized
from dig_jax.planning.fitting import SIZES, largest_fitting

ROOT = Path(__file__).parent.parent


def compiled_text(function, *arrays):
    return jax.jit(function).lower(*arrays).compile().as_text()


# Counting a program.


def test_a_product_in_a_loop_counts_once_per_turn():
    x = jnp.ones((32, 64))
    weights = jnp.ones((5, 64, 64))

    def function(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    assert sum(count(compiled_text(function, x, weights)).flops.values()) == 5 * 2 * 32 * 64 * 64


def test_loops_in_loops_multiply():
    def function(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=3)[0], None

        return jax.lax.scan(outer, x, length=4)[0]

    assert sum(count(compiled_text(function, jnp.ones((32, 32)))).flops.values()) == 12 * 2 * 32**3


def test_memory_traffic_is_what_is_read_and_written():
    x = jnp.ones((256, 256))
    assert count(compiled_text(lambda x, y: 2 * x + y, x, x)).bytes == 3 * x.nbytes


def test_of_a_slice_only_the_part_is_traffic():
    x = jnp.ones((1000, 256))
    text = compiled_text(lambda x, i: 2 * jax.lax.dynamic_slice_in_dim(x, i, 1), x, 3)
    assert count(text).bytes <= 4 * 256 * x.itemsize


# A TPU's product of 4 × 256 tokens of 384 channels with a matrix of 6 heads × 64: the heads are a window of 6
# places over one, the rest of it padding. The weights and the result stay on the chip.
TPU_PRODUCT = """HloModule product, is_scheduled=true

%fused (param_0: bf16[4,256,384,1], param_1: bf16[6,64,384,1]) -> bf16[4,256,6,64] {
  %param_0 = bf16[4,256,384,1]{2,1,3,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[6,64,384,1]{2,1,0,3:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[4,256,6,64]{1,3,2,0:T(8,128)(2,1)S(1)} convolution(%param_0, %param_1), \
window={size=1x6 pad=0_0x5_5 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f
}

ENTRY %main (a: bf16[4,256,384,1], b: bf16[6,64,384,1]) -> bf16[4,256,6,64] {
  %a = bf16[4,256,384,1]{2,1,3,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[6,64,384,1]{2,1,0,3:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %fusion = bf16[4,256,6,64]{1,3,2,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kOutput, calls=%fused
}
"""


def test_padding_of_a_product_is_no_work_and_what_stays_on_the_chip_no_traffic():
    counts = count(TPU_PRODUCT)
    assert counts.flops == {"bfloat16": 2 * 4 * 256 * 384 * 384}
    assert counts.bytes == 2 * 4 * 256 * 384


KERNEL = """HloModule kernel

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %d = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)
  ROOT %k = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%d), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"1000","bytes_accessed":"4096"}}}
}
"""


def test_a_kernel_counts_as_it_says_less_what_it_finds_on_the_chip():
    counts = count(KERNEL)
    assert counts.flops == {"bfloat16": 1000}
    assert counts.bytes == 2048 + (4096 - 2048)  # fetched ahead, then written


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", (0, 4)),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['b'=4,'c'=2], device_ids=([8]) {'b'}", (0, 2, 4, 6)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
    ],
)
def test_the_devices_of_a_collective_are_read_in_every_notation(groups, first):
    opcode = "collective-permute" if "pairs" in groups else "all-gather"
    line = f"  ROOT %c = f32[99]{{0}} {opcode}(%a), channel_id=1, {groups}, dimensions={{0}}"
    text = f"ENTRY %main (a: f32[10]) -> f32[99] {{\n  %a = f32[10]{{0}} parameter(0)\n{line}\n}}\n"
    [collective] = count(text).collectives
    size = 40 if "pairs" in groups else 40 * len(first)
    assert collective == Collective(opcode, size, first)


def test_collectives_of_a_sharded_product_are_found():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    split = NamedSharding(mesh, P(None, "data"))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    product = jax.jit(lambda x: x @ x.T, out_shardings=NamedSharding(mesh, P()))
    counts = count(product.lower(x).compile().as_text())
    assert counts.exchanged() == {"all-reduce": 64 * 64 * 4}
    assert counts.collectives[0].group == (0, 1, 2, 3)
    assert sum(counts.flops.values()) == 2 * 64**3 / 4


# The model's own flops.


def test_model_flops_are_those_of_products_and_recurrences():
    def forward(x, w):
        return jax.checkpoint(lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=3)[0])(x)

    assert forward_flops(forward, jnp.ones((4, 8)), jnp.ones((8, 8))) == 3 * 2 * 4 * 8 * 8


@pytest.mark.parametrize("remat", ["none", "full"])
def test_model_flops_of_xl_are_those_of_its_layers_however_they_are_stored(remat):
    c = dig_xl.get_config()
    c.data.name, c.model.remat = "fake", remat
    components = Components(config.from_dict(c.to_dict()))
    params = jax.eval_shape(components.init_params, jax.random.key(0))
    image, number = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    width, hidden, tokens = 1152, 3072, 256
    per_token = 2 * width * width // 2 + 3 * width * width + width * 16 + 16 * width // 2 + 3 * width * hidden
    block = tokens * (2 * per_token + 4 * 18 * 32 * 64) + 2 * 6 * width * width
    ends = tokens * 2 * width * (16 + 32) + 2 * (256 * width + width * width + 2 * width * width)
    assert training_flops(components.denoise, params, image, number, number) == 3 * (28 * block + ends)


# Times.


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    coords: tuple[int, ...]
    process_index: int = 0


def slice_of(*shape):
    return [FakeDevice(tuple(map(int, coords))) for coords in np.ndindex(*shape)]


def exchange(chip, devices, kind="all-reduce", group=None, size=10**9):
    counts = Counts(collectives=[Collective(kind, size, group or tuple(range(len(devices))))])
    return roofline(counts, CHIPS[chip], devices).interconnect


def test_the_bound_is_the_longest_of_the_times():
    counts = Counts()
    counts.flops.update({"bfloat16": 197e12, "highest": 197e12})
    counts.bytes = 2 * 819 * 10**9
    times = roofline(counts, CHIPS["v5e"], slice_of(2, 2, 1))
    assert (times.compute, times.memory, times.interconnect) == (7, 2, 0)
    assert (times.seconds, times.bound) == (7, "compute")


def test_a_closed_ring_has_twice_the_links_of_a_line():
    line, ring = exchange("v5e", slice_of(8, 1, 1)), exchange("v5e", slice_of(16, 1, 1))
    assert line == pytest.approx(2 * 7 / 8 * 1e9 / 50e9)
    assert ring == pytest.approx(2 * 15 / 16 * 1e9 / 100e9)
    assert exchange("v5e", slice_of(16, 16, 1)) == pytest.approx(2 * 255 / 256 * 1e9 / 200e9)


def test_a_group_uses_only_the_axes_that_it_spans():
    column = tuple(range(16))  # the last axis of 16 × 16
    devices = [FakeDevice((x, y, 0)) for x in range(16) for y in range(16)]
    assert exchange("v6e", devices, "all-gather", column) == pytest.approx(15 / 16 * 1e9 / 200e9)


def test_gpus_of_several_hosts_are_held_up_by_the_network():
    hosts = [FakeDevice((host, 0, i), host) for host in range(4) for i in range(8)]
    assert exchange("h100", hosts[:8]) == pytest.approx(2 * 7 / 8 * 1e9 / 450e9)
    assert exchange("h100", hosts) == pytest.approx(2 * 31 / 32 * 1e9 / 400e9)
    assert exchange("h100", hosts, group=(0, 8, 16, 24)) == pytest.approx(2 * 3 / 4 * 1e9 / 50e9)


def test_a_device_is_known_by_the_longest_kind_that_it_begins_with():
    assert chip_of_kind("TPU v5 lite").name == "v5e"
    assert chip_of_kind("TPU v5").name == "v5p"
    assert chip_of_kind("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip_of_kind("cpu") is None


# The largest batch.


@pytest.mark.parametrize("start", [1, 4, 5, 64, 4096])
@pytest.mark.parametrize("slope", [0.4, 3.0, 900.0])
def test_the_largest_batch_that_fits_is_found_by_few_measurements_and_was_measured(start, slope):
    measured = []

    def needed(size):
        measured.append(size)
        return 300 + slope * size

    found = largest_fitting(needed, start, fixed=200, limit=1000.0, attempts=6)
    fitting = [size for size in (*SIZES, start) if 300 + slope * size <= 1000]
    assert found == max(fitting, default=0)
    assert len(measured) == len(set(measured)) <= 6
    assert found in (0, *measured)


def test_what_does_not_fit_without_images_fits_with_none():
    assert largest_fitting(lambda size: 2000 + size, 1, fixed=2000, limit=1000.0) == 0


# Topologies.


@pytest.mark.parametrize("name", ["v5", "v5e", "v5e:", "v5e:16x", "v5e:0x4", "v7:2x2", "a100:8", "V5E:2x2"])
def test_an_unknown_topology_is_answered_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=rf"--topology={name} is unknown.*this.*v5e:16x16.*h100:8x4"):
        topology.find_topology(name)


@pytest.mark.parametrize(("name", "package"), [("v5e:2x2", "libtpu"), ("h200:8", "xla_cuda13")])
def test_a_compiler_that_is_missing_is_named(monkeypatch, name, package):
    monkeypatch.setattr(topology, "_installed", lambda module: False)
    with pytest.raises(UserError, match=rf"not installed \(.*{package}.*pip install -e '.\[compilers\]'"):
        topology.find_topology(name)


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
    not topology._installed("jax_plugins.xla_cuda13"), reason="jax-cuda13-plugin is not installed"
)


@needs_libtpu
@pytest.mark.parametrize(("name", "devices"), [("v4:2x2x1", 4), ("v6e:2x4", 8), ("tpu7x:2x2x1", 8)])
def test_topologies_of_tpus_have_their_chips(name, devices):
    found = topology.find_topology(name)
    assert (found.chips, len(found.devices)) == (math.prod(map(int, name.split(":")[1].split("x"))), devices)
    assert chip_of_kind(found.devices[0].device_kind) == found.chip


@needs_libtpu
def test_a_size_that_there_is_not_gives_one_line():
    with pytest.raises(ConfigError, match="--topology=v5e:3x5: .*not divisible"):
        topology.find_topology("v5e:3x5")


@needs_cuda
def test_gpus_are_counted_per_host_and_hosts():
    found = topology.find_topology("h100:8x4")
    assert found.chips == 32
    assert [device.process_index for device in found.devices] == [host for host in range(4) for _ in range(8)]
    with pytest.raises(ConfigError, match="--topology=h100:8x4x2: GPUs are counted as PER_HOST"):
        topology.find_topology("h100:8x4x2")


# The plan.


def main_py(*arguments):
    command = [sys.executable, str(ROOT / "main.py"), "--mode=plan", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_machine_itself_is_planned_for_without_a_workdir_or_data(tmp_path):
    """As JSON, of a config whose data there is not; and nothing is written."""
    arguments = ["--config=configs/smoke.py", "--config.data.name=not_there", "--config.model.depth=1"]
    done = main_py(*arguments, f"--workdir={tmp_path}/run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["topology"], found["chips"], found["memory_limit"]) == ("this", 1, None)
    train = found["train"]
    assert 4 * found["parameters"] == train["memory"]["parameters"] == train["memory"]["averages"] / 2
    assert 2 * train["memory"]["parameters"] <= train["memory"]["optimizer"]
    assert sum(train["flops"].values()) == pytest.approx(16 * found["model_flops_per_image"], rel=0.2)
    assert not (tmp_path / "run").exists()


def test_flags_of_the_plan_go_with_it():
    command = [sys.executable, "main.py", "--config=configs/smoke.py", "--topology=v5e:2x2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --topology and --json go with --mode=plan\n")


def narrow_dig():
    c = dig_s.get_config()
    c.model.depth, c.model.hidden_size, c.model.num_heads = 1, 128, 2
    c.model.dtype = "bfloat16"
    c.data.batch_size = 8
    return config.from_dict(c.to_dict())


@needs_libtpu
def test_a_plan_for_tpus_counts_kernels_and_collectives():
    found = plan.plan(narrow_dig(), "v5e:2x2", train_only=True)
    train = found["train"]
    assert train["collectives"].keys() == {"all-reduce"}
    assert 2 * found["parameters"] <= train["collectives"]["all-reduce"] <= 6 * found["parameters"]
    assert 1 <= sum(train["flops"].values()) / (2 * found["model_flops_per_image"]) <= 1.5
    assert train["memory_needed"] < found["memory_limit"] == 15.75 * 2**30
    assert train["step_seconds"] == max(train["seconds"].values())
    assert train["days"] * 86400 == pytest.approx(400_000 * train["step_seconds"])
    text = plan.summary(found)
    assert "4 chips (data 4)" in text and "(the bound)" in text and "it fits" in text


@needs_libtpu
def test_a_program_for_tpus_is_read_before_its_machine_code_is_made_and_keeps_heads_together():
    run = plan._Run.of(plan._without_data(narrow_dig()), topology.find_topology("v5e:2x2"))
    early, late = plan._program(run, plan._lower_train_step), compiled(plan._lower_train_step(run))
    assert count(early.text) == count(late.text)
    assert early.memory["arguments"] == late.memory["arguments"]
    assert sum(early.memory.values()) == pytest.approx(sum(late.memory.values()), rel=0.1)
    # A head in a dimension of its own is padded to 128 lanes, and copied for the kernel.
    assert not re.search(r"bf16\[2,256,2,(32|64)\]\S* (copy|reshape|fusion|convolution)\(", early.text)


@needs_libtpu
def test_a_program_that_tpus_have_no_memory_for_is_refused_with_its_size():
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refusal:
        optimized(lower_too_large)
    assert plan._refused(refusal.value) == 96 * 2**30


def lower_too_large():
    """For a TPU with 15.75 GiB; at the top level, as another process is to call it."""
    device = SingleDeviceSharding(topology.find_topology("v5e:2x2").devices[0])
    x = jax.ShapeDtypeStruct((1 << 17, 1 << 16), jnp.float32, sharding=device)
    return jax.jit(lambda x: x @ x.T).lower(x)


def test_a_batch_that_the_devices_do_not_divide_is_refused_as_in_training():
    with pytest.raises(ConfigError, match="config.data.batch_size=8 is not a multiple of"):
        plan.plan(tiny_settings(mesh__data=3), "this")
