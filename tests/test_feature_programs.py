"""Programs of the feature networks: full precision on every chip, and weights as arguments."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dig_jax.evaluation.features.dinov2 import ARCHITECTURES, Dinov2
from dig_jax.evaluation.features.inception import Inception
from dig_jax.hardware.hlo_cost import count
from dig_jax.planning.compiling import compile_fully, compile_without_codegen
from dig_jax.planning.topology import find_topology

NETWORKS = {
    "inception": Inception,
    "dinov2_vitb14": lambda: Dinov2("dinov2_vitb14", ARCHITECTURES["dinov2_vitb14"]),
    "dinov2_vitb14 as dgm-eval": lambda: Dinov2("dinov2_vitb14", ARCHITECTURES["dinov2_vitb14"], "dgm_eval"),
}


def lowered(name, batch, sharding=None):
    network, images = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (nnx.eval_shape(NETWORKS[name]), jax.ShapeDtypeStruct((batch, 64, 64, 3), jnp.uint8)),
    )
    return jax.jit(lambda network, images: network(images)).lower(network, images)


@functools.cache
def text(name):
    return lowered(name, 2).as_text()


@pytest.mark.parametrize("name", NETWORKS)
def test_all_products_are_at_the_highest_precision(name):
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*", text(name))
    assert len(products) > 5
    assert [line for line in products if line.count("HIGHEST") != 2] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_are_arguments_of_the_program(name):
    """Constants in it would be copied for every shape of the images, and slow down the compiler."""
    constants = re.findall(r"stablehlo\.constant dense<\"0x[0-9A-F]*", text(name))
    assert sum(map(len, constants)) < 2**20


def lower_inception(topology):
    """For one chip; in another process for TPUs."""
    return lowered("inception", 1, SingleDeviceSharding(find_topology(topology).devices[0]))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "h200:1"])
def test_inception_compiles_for_a_chip(topology):
    pytest.importorskip("libtpu", reason="needs the compilers for chips")
    lower = functools.partial(lower_inception, topology)
    program = compile_fully(lower()) if topology.startswith("h200") else compile_without_codegen(lower)
    flops = count(program.text).flops
    assert set(flops) == {"highest"}
    assert flops["highest"] > 10.5e9  # 10.9 GFLOPs, and what a compiler adds at a batch of 1
