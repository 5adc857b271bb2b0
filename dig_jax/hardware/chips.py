"""Peak rates of accelerators, from the manufacturers' pages."""

import dataclasses

GIGA, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    kind: prefix of its `jax.Device.device_kind`.
    flops: dense peak FLOP/s of matrix products by operand type: "bfloat16"; "float32" at default precision
        (bfloat16 on a TPU, TF32 on a GPU); "highest", float32 at the highest precision.
    memory: bytes.
    usable_fraction: fraction of device memory available to a program.
    bandwidth: memory bandwidth, bytes/s.
    link: bandwidth in one direction, bytes/s: of one torus link of a TPU, or of all links of a GPU to its
        host's switch.
    ring: a slice axis closes to a ring if its length is a multiple of this; 0 for GPUs.
    network: bandwidth in one direction from a GPU to other hosts, bytes/s; 0 for TPUs.
    devices: JAX devices per chip, which share all rates above.
    config: the compiler's name of the chip's mode of operation.
    source: URL of the figures.
    """

    name: str
    kind: str
    flops: dict[str, float]
    memory: float
    bandwidth: float
    link: float
    ring: int = 0
    network: float = 0.0
    devices: int = 1
    usable_fraction: float = 1.0
    config: str = "default"
    source: str


def _tpu(peak: float) -> dict[str, float]:
    # One float32 product at the highest precision takes six bfloat16 products.
    return {"bfloat16": peak, "float32": peak, "highest": peak / 6}


# Memory: the limit that libtpu 0.0.42 reports when a program does not fit. Link: half of the published
# bidirectional bandwidth of a chip, divided by its number of links; v4 from Jouppi et al. 2023
# (arXiv:2304.01433). Rings: multiples of 4 chips on v4, v5p and TPU7x, of 16 on v5e and v6e.
_TPUS = (
    Chip(
        name="v4",
        kind="TPU v4",
        flops=_tpu(275 * TERA),
        memory=30.75 * GIB,
        bandwidth=1200 * GIGA,
        link=50 * GIGA,
        ring=4,
        config="megacore",
        source="https://cloud.google.com/tpu/docs/v4",
    ),
    Chip(
        name="v5e",
        kind="TPU v5 lite",
        flops=_tpu(197 * TERA),
        memory=15.75 * GIB,
        bandwidth=819 * GIGA,
        link=50 * GIGA,
        ring=16,
        source="https://cloud.google.com/tpu/docs/v5e",
    ),
    Chip(
        name="v5p",
        kind="TPU v5",
        flops=_tpu(459 * TERA),
        memory=95.74 * GIB,
        bandwidth=2765 * GIGA,
        link=100 * GIGA,
        ring=4,
        source="https://cloud.google.com/tpu/docs/v5p",
    ),
    Chip(
        name="v6e",
        kind="TPU v6 lite",
        flops=_tpu(918 * TERA),
        memory=31.25 * GIB,
        bandwidth=1638 * GIGA,
        link=100 * GIGA,
        ring=16,
        source="https://cloud.google.com/tpu/docs/v6e",
    ),
    Chip(
        name="tpu7x",
        kind="TPU7x",
        flops=_tpu(2307 * TERA),
        memory=2 * 94.75 * GIB,
        bandwidth=7380 * GIGA,
        link=100 * GIGA,
        ring=4,
        devices=2,
        source="https://cloud.google.com/tpu/docs/tpu7x",
    ),
)
# JAX preallocates three quarters of a GPU's memory by default (XLA_PYTHON_CLIENT_MEM_FRACTION). Network: a
# DGX, with a port of 400 Gb/s for each GPU.
_HOPPER = {"bfloat16": 989.4 * TERA, "float32": 494.7 * TERA, "highest": 66.9 * TERA}
_GPUS = (
    Chip(
        name="h100",
        kind="NVIDIA H100",
        flops=_HOPPER,
        memory=79 * GIB,
        usable_fraction=0.75,
        bandwidth=3350 * GIGA,
        link=450 * GIGA,
        network=50 * GIGA,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
    Chip(
        name="h200",
        kind="NVIDIA H200",
        flops=_HOPPER,
        memory=139 * GIB,
        usable_fraction=0.75,
        bandwidth=4800 * GIGA,
        link=450 * GIGA,
        network=50 * GIGA,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
)
CHIPS = {chip.name: chip for chip in _TPUS + _GPUS}


def chip_of_kind(device_kind: str) -> Chip | None:
    """Return the chip whose `kind` is the longest prefix of a device kind, or None if none matches."""
    matches = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(matches, key=lambda chip: len(chip.kind), default=None)
