"""The operands and static options of a selective scan."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float

_MOST_TOKENS = 64  # in a chunk: a chunk of states, 16 per channel, fits into a TPU's VMEM
_ROWS = 8  # of a TPU's register


class Operands(NamedTuple):
    """The arrays of a scan. Matrices and states have the channels last, in the lanes of a vector unit."""

    x: Float[Array, "b t d"]
    dt: Float[Array, "b t d"]
    a: Float[Array, "n d"]
    b: Float[Array, "b t n"]
    c: Float[Array, "b t n"]
    d: Float[Array, " d"]
    z: Float[Array, "b t d"] | None
    initial_state: Float[Array, "b n d"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options: the direction, and whether Pallas kernels are interpreted."""

    reverse: bool = False
    interpret: bool = False


def chunk_size(tokens: int) -> int:
    """Return the number of tokens between saved states: a multiple of 8, with little padding at the end."""
    chunks = -(-tokens // _MOST_TOKENS)
    return _ROWS * -(-tokens // (chunks * _ROWS))
