"""The description of a scan that every backend takes: its arrays and its static options."""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int


class Operands(NamedTuple):
    """The arrays of a scan, with tokens in raster order. Optional arrays are None if absent.

    In a gated scan (`Scan.gating`) `g` holds decay logits, and `out_gate` and `norm_weight` are set.
    """

    q: Float[Array, "b t h k"]
    k: Float[Array, "b t h k"]
    v: Float[Array, "b t h v"]
    g: Float[Array, "b t h k"]
    out_gate: Float[Array, "b t h v"] | None = None
    norm_weight: Float[Array, "b v"] | None = None
    initial_state: Float[Array, "b h k v"] | None = None
    segment_ids: Int[Array, "b t"] | None = None


@dataclasses.dataclass(frozen=True)
class Gating:
    """The gates of `pallas_gla.gated_gla_2d`: g = logsigmoid(logits) / normalizer, RMSNorm with `eps`."""

    normalizer: float
    eps: float


@dataclasses.dataclass(frozen=True)
class Scan:
    """The static options of a scan. If `chunk_size` is None the backend chooses it."""

    scale: float
    grid: tuple[int, int]
    direction: str
    chunk_size: int | None = None
    gating: Gating | None = None
    interpret: bool = False

    @property
    def reverse(self) -> bool:
        """Whether the scan visits the last token first."""
        return self.direction.endswith("reversed")

    @property
    def by_columns(self) -> bool:
        """Whether the scan runs down the columns of the grid."""
        return self.direction.startswith("column")


def ungated(scan: Scan) -> Scan:
    """Return the options of the scan inside a gated scan."""
    return dataclasses.replace(scan, gating=None)


# The most tokens between two saved states.
STATE_INTERVAL = 64


def saved_shape(operands: Operands, scan: Scan) -> tuple[tuple[Any, ...], str]:
    """Return the shape and dtype of the states that a forward pass saves for the backward pass.

    The shape is [B, N, V, H * K]: one transposed state, heads side by side, for every `chunk_size` tokens but
    at least every 64. All kernels use this shape, because a program may be traced before its platform is
    known. A kernel with longer chunks leaves the last entries unused.
    """
    batch, tokens, heads, width = operands.k.shape
    chunks = -(-tokens // min(scan.chunk_size or STATE_INTERVAL, STATE_INTERVAL))
    dtype = "float32" if operands.v.dtype == "float32" else "bfloat16"
    return (batch, chunks, operands.v.shape[3], heads * width), dtype
