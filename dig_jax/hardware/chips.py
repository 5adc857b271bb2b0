"""The peaks of accelerators, as data, from their makers' pages."""

import dataclasses

GIGA, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator.

    kind: how its `jax.Device.device_kind` begins.
    flops: dense peak per second of matrix products, by what they multiply: "bfloat16"; "float32" of default
        precision, which a TPU does in bfloat16 and a GPU in TF32; "highest", float32 of the highest.
    memory: bytes.
    share: of its memory, that a program may use.
    bandwidth: bytes per second of its memory.
    link: bytes per second, in one direction, of one link to a neighbour in a torus, or of all of a GPU's
        links to its host's switch.
    ring: an axis of a slice is closed to a ring where its chips are a multiple of so many; 0: no torus.
    network: bytes per second, in one direction, from a GPU to other hosts; 0: all are one torus.
    devices: JAX devices per chip; they share all that is said here.
    config: what the compiler calls the chip's mode of operation.
    source: where the figures stand.
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
    share: float = 1.0
    config: str = "default"
    source: str


def _tpu(peak: float) -> dict[str, float]:
    # The highest precision of float32 takes six products of bfloat16.
    return {"bfloat16": peak, "float32": peak, "highest": peak / 6}


# Memory is what libtpu 0.0.42 allows, as it says when a program does not fit. A link is the published
# bandwidth of a chip in both directions, halved, over the number of its links; that of a v4 is from Jouppi et
# al. 2023 (arXiv:2304.01433). A v4 axis closes to a ring at multiples of 4 chips, a v5e or v6e axis at 16.
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
# Of a GPU's memory JAX takes three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. The
# network is that of a DGX: a port of 400 Gb/s for each GPU.
_HOPPER = {"bfloat16": 989.4 * TERA, "float32": 494.7 * TERA, "highest": 66.9 * TERA}
_GPUS = (
    Chip(
        name="h100",
        kind="NVIDIA H100",
        flops=_HOPPER,
        memory=79 * GIB,
        share=0.75,
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
        share=0.75,
        bandwidth=4800 * GIGA,
        link=450 * GIGA,
        network=50 * GIGA,
        source="https://www.nvidia.com/en-us/data-center/h200/",
    ),
)
CHIPS = {chip.name: chip for chip in _TPUS + _GPUS}


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip with the longest kind that the device's begins with; None where the table has none."""
    fitting = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)
