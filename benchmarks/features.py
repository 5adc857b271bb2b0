"""Images per second of the feature networks: measured on this machine, or computed for chips that are absent.

    python benchmarks/features.py [--network=inception] [--size=256] [--batch=16] [--batches=4]
    python benchmarks/features.py --network=inception --batch=128 --topology=v5e:2x2

The weights are random. With --topology, the program is compiled for one chip of it. FLOPs and bytes over the
chip's peak rates give an upper bound of the speed (docs/guide/plan.md).
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dig_jax.evaluation.features.dinov2 import ARCHITECTURES, Dinov2
from dig_jax.evaluation.features.inception import Inception
from dig_jax.hardware.hlo_cost import count
from dig_jax.hardware.roofline import roofline
from dig_jax.planning.compiling import compile_fully, compile_without_codegen
from dig_jax.planning.topology import find_topology


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=("inception", *ARCHITECTURES), default="inception")
    for name, default in {"size": 256, "batch": 16, "batches": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--topology", help="such as v5e:2x2 or h200:1; one chip is used")
    options = parser.parse_args()
    subject = f"{options.network}, {options.size} px, batch {options.batch}"
    if options.topology:
        print(f"{subject}, {options.topology}: {_planned(options)}")
    else:
        print(f"{subject}, {jax.devices()[0].device_kind}: {_measured(options)}")


def _make(name: str) -> nnx.Module:
    return Inception() if name == "inception" else Dinov2(name, ARCHITECTURES[name])


def _features(network: nnx.Module, images: jax.Array) -> dict[str, jax.Array]:
    return network(images)


def _measured(options: argparse.Namespace) -> str:
    random = np.random.default_rng(0)
    network = jax.tree.map(
        lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32) ** 2 / max(x.shape)),
        _make(options.network),
    )
    shape = (options.batch, options.size, options.size, 3)
    images = jnp.asarray(random.integers(0, 256, shape, np.uint8))
    run = jax.jit(_features).lower(network, images).compile()
    jax.block_until_ready(run(network, images))
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.batches):
        jax.block_until_ready(run(network, images))
    done = options.batch * options.batches
    wall, busy = time.perf_counter() - began, time.process_time() - cpu
    return f"{done / wall:.1f} images/s, {done / busy:.1f} images per second of CPU time"


def _planned(options: argparse.Namespace) -> str:
    topology = find_topology(options.topology)
    assert topology.chip is not None
    lower = functools.partial(_lower, options)
    program = compile_fully(lower()) if topology.chip.network else compile_without_codegen(lower)
    counts = count(program.text)
    bound = roofline(counts, topology.chip, topology.devices)
    flops = ", ".join(f"{n / options.batch / 1e9:.1f} GFLOPs ({kind})" for kind, n in counts.flops.items())
    memory = sum(program.memory.values()) / 2**30
    return (
        f"at most {options.batch / bound.seconds:,.0f} images/s ({bound.bound}); {flops} and"
        f" {counts.bytes / options.batch / 1e6:.0f} MB per image, {memory:.2f} GiB"
    )


def _lower(options: argparse.Namespace) -> jax.stages.Lowered:
    """Lower the network for one device of the topology."""
    sharding = jax.sharding.SingleDeviceSharding(find_topology(options.topology).devices[0])
    abstract = nnx.eval_shape(lambda: _make(options.network))
    shape = (options.batch, options.size, options.size, 3)
    network, images = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (abstract, jax.ShapeDtypeStruct(shape, jnp.uint8)),
    )
    return jax.jit(_features).lower(network, images)


if __name__ == "__main__":
    main()
