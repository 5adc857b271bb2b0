"""How many tokens the TPU kernels take at once, by generation of the chip."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel's blocks.

    `chunk` tokens meet in one matrix product. One grid step runs several chunks, so that the products of
    one fill the gaps that the dependent arithmetic of another leaves. `lanes` is the most key lanes
    (heads * K) of a block: more heads than that are split over the grid. `column_tokens` is the most 16-bit
    tokens of a block of columns: longer columns are copied into rows before.
    """

    chunk: int
    forward_chunks: int
    backward_chunks: int
    lanes: int = 640
    column_tokens: int = 512
    vmem_limit_bytes: int | None = None


# By `device_kind`. Chunks of 64 fill 128-wide matrix units; 256-wide ones (v6e, TPU7x) are bound by loading
# weights unless a chunk has 128 rows. v4 has 16 MiB of VMEM. Measured: kernels/benchmarks/static_tpu.py.
BLOCKS = {
    "TPU v4": Blocks(64, 4, 2, column_tokens=256),
    "TPU v5 lite": Blocks(64, 8, 8, vmem_limit_bytes=64 * 2**20),
    "TPU v5": Blocks(64, 8, 8, vmem_limit_bytes=48 * 2**20),
    "TPU v6 lite": Blocks(128, 4, 4, vmem_limit_bytes=64 * 2**20),
    "TPU7x": Blocks(128, 4, 4, vmem_limit_bytes=48 * 2**20),
}
ANY_TPU = Blocks(64, 2, 1, column_tokens=256)


def device_kind() -> str | None:
    """The kind of TPU that is compiled for; None where that cannot be known.

    Ahead of time it is the abstract device of the context mesh (`jax.sharding.use_abstract_mesh`).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind
    device = jax.devices()[0]
    return device.device_kind if device.platform == "tpu" else None


def blocks() -> Blocks:
    """Sizes for the TPU that is compiled for, or some that every TPU can run."""
    return BLOCKS.get(device_kind(), ANY_TPU)
