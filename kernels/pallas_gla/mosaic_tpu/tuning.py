"""Block sizes of the TPU kernels, by device kind."""

import dataclasses

from pallas_gla import chip


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes for one kind of TPU.

    chunk: tokens in one matrix product.
    forward_chunks, backward_chunks: chunks in a grid step. The products of one chunk fill the gaps that the
        dependent arithmetic of another leaves.
    lanes: the most 16-bit key lanes (heads * K) in a block; more heads are split over the grid.
    column_tokens: the most 16-bit tokens in a block of columns; longer columns are first copied into rows.
    vmem_limit_bytes: the compiler's limit on VMEM, or None for its default.
    """

    chunk: int
    forward_chunks: int
    backward_chunks: int
    lanes: int = 640
    column_tokens: int = 512
    vmem_limit_bytes: int | None = None


# By `device_kind`. Chunks of 64 fill 128-wide matrix units; 256-wide units (v6e, TPU7x) are bound by loading
# weights unless chunks have 128 rows. v4 has 16 MiB of VMEM. See kernels/benchmarks/static_tpu.py.
BLOCKS = {
    "TPU v4": Blocks(64, 4, 2, column_tokens=256),
    "TPU v5 lite": Blocks(64, 8, 8, vmem_limit_bytes=64 * 2**20),
    "TPU v5": Blocks(64, 8, 8, vmem_limit_bytes=48 * 2**20),
    "TPU v6 lite": Blocks(128, 4, 4, vmem_limit_bytes=64 * 2**20),
    "TPU7x": Blocks(128, 4, 4, vmem_limit_bytes=48 * 2**20),
}
ANY_TPU = Blocks(64, 2, 1, column_tokens=256)


def blocks() -> Blocks:
    """Return the sizes for the TPU that is compiled for, or sizes that run on every TPU."""
    return BLOCKS.get(chip.current().kind or "", ANY_TPU)
