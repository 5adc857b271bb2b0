"""What a kernel is asked to compute: the arrays of a scan, and everything about it that is static."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Operands(NamedTuple):
    """The arrays of a scan, with tokens in raster order; None where there is none.

    A gated scan (`Scan.gating`) has the decay's logits in place of `g`, and `out_gate` and `norm_weight`.
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
    """The static part; `chunk_size` None leaves it to the kernel."""

    scale: float
    grid: tuple[int, int]
    direction: str
    chunk_size: int | None = None
    gating: Gating | None = None
    interpret: bool = False

    @property
    def reverse(self) -> bool:
        """Whether the last token is visited first."""
        return self.direction.endswith("reversed")

    @property
    def by_columns(self) -> bool:
        """Whether neighbours along the scan are neighbours in a column of the grid."""
        return self.direction.startswith("column")


# Tokens between two saved states, at most.
STATE_INTERVAL = 64


def saved_shape(operands: Operands, scan: Scan) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the states that a forward pass saves for the backward pass.

    [B, N, V, H * K]: for every `chunk_size` tokens, or 64, room for the state that enters them, transposed,
    the heads side by side. One shape for all kernels, because a program may be traced before its platform is
    known; a kernel with longer chunks leaves the last places empty.
    """
    batch, tokens, heads, width = operands.k.shape
    chunks = -(-tokens // min(scan.chunk_size or STATE_INTERVAL, STATE_INTERVAL))
    dtype = "float32" if operands.v.dtype == "float32" else "bfloat16"
    return (batch, chunks, operands.v.shape[3], heads * width), dtype
