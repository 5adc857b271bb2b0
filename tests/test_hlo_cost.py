"""FLOPs, memory traffic and collectives counted in optimized HLO."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dig_jax.hardware.hlo_collectives import Collective
from dig_jax.hardware.hlo_cost import count


def compiled_text(function, *arrays):
    return jax.jit(function).lower(*arrays).compile().as_text()


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


def test_memory_traffic_is_reads_and_writes():
    x = jnp.ones((256, 256))
    assert count(compiled_text(lambda x, y: 2 * x + y, x, x)).bytes == 3 * x.nbytes


def test_a_slice_reads_only_its_elements():
    x = jnp.ones((1000, 256))
    text = compiled_text(lambda x, i: 2 * jax.lax.dynamic_slice_in_dim(x, i, 1), x, 3)
    assert count(text).bytes <= 4 * 256 * x.itemsize


# As XLA writes it for a GPU.
CUBLAS = """HloModule product, is_scheduled=true

ENTRY %main (a: f32[8,16], b: f32[16,4]) -> (f32[8,4], s8[1024]) {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[16,4]{{1,0}} parameter(1)
  ROOT %product = (f32[8,4]{{1,0}}, s8[1024]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"]}},\
"precision_config":{{"operand_precision":["{precision}","{precision}"]}}}}}}
}}
"""


@pytest.mark.parametrize(("precision", "kind"), [("DEFAULT", "float32"), ("HIGHEST", "highest")])
def test_a_cublas_call_counts_at_its_precision(precision, kind):
    assert count(CUBLAS.format(precision=precision)).flops == {kind: 2 * 8 * 16 * 4}


# As XLA writes the forward pass of JAX's attention for TPUs, without the attributes.
SPLASH = """HloModule attention, is_scheduled=true

ENTRY %main (m: s8[1,1,1], q: bf16[2,3,256,64], k: bf16[2,3,512,64]) -> bf16[2,3,256,64] {
  %m = s8[1,1,1]{2,1,0} parameter(0)
  %q = bf16[2,3,256,64]{3,2,1,0} parameter(1)
  %k = bf16[2,3,512,64]{3,2,1,0} parameter(2)
  ROOT %splash_mha_PASS_residuals.1 = bf16[2,3,256,64]{3,2,1,0} custom-call(%m, %m, %q, %k, %k), \
custom_call_target="tpu_custom_call"
}
"""


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_on_tpus_counts_its_matrix_products(name, products):
    flops = products * 2 * (2 * 3 * 256 * 64) * 512
    assert count(SPLASH.replace("PASS", name)).flops == {"bfloat16": flops}


# An update in place by a GPU, which runs beside other operations and returns operands, result and context.
ASYNC_UPDATE = """HloModule update, is_scheduled=true

%fused (param_0: f32[7,256], param_1: s32[], param_2: f32[1,256]) -> f32[7,256] {
  %param_0 = f32[7,256]{1,0} parameter(0)
  %param_2 = f32[1,256]{1,0} parameter(2)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %updated = f32[7,256]{1,0} dynamic-update-slice(%param_0, %param_2, %param_1, %zero)
}

ENTRY %main (a: f32[7,256], i: s32[], b: f32[1,256]) -> f32[7,256] {
  %a = f32[7,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[1,256]{1,0} parameter(2)
  %start = ((f32[7,256]{1,0}, s32[], f32[1,256]{1,0}), f32[7,256]{1,0}, u32[]) fusion-start(%a, %i, %b), \
kind=kLoop, calls=%fused
  ROOT %done = f32[7,256]{1,0} fusion-done(%start)
}
"""


def test_an_asynchronous_update_in_place_reads_and_writes_its_slice_only():
    row = 4 * 256
    assert 2 * row <= count(ASYNC_UPDATE).bytes <= 2 * row + 8


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


def test_padding_is_no_work_and_on_chip_arrays_are_no_traffic():
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


def test_a_kernel_counts_by_its_estimate_without_on_chip_arrays():
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
def test_groups_of_devices_are_parsed_in_every_notation(groups, first):
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
