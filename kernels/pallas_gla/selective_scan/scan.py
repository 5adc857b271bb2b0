"""The operands and static options of a selective scan."""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Float

_MOST_TOKENS = 64  # in a chunk: a chunk of states, 16 per channel, fits into a TPU's VMEM
ROWS = 8  # of a TPU's register, and tokens that the kernels load together


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
    """Static options.

    Args:
        reverse: whether the last token comes first.
        implementation: a kernel's name, or None for the best one for the platform.
        interpret: whether to run a Pallas kernel in interpret mode.
    """

    reverse: bool = False
    implementation: str | None = None
    interpret: bool = False


def chunk_size(tokens: int) -> int:
    """Return the number of tokens between saved states: 64, or a multiple of 8 for fewer tokens."""
    return min(_MOST_TOKENS, ROWS * -(-tokens // ROWS))


def num_chunks(tokens: int) -> int:
    """Return the number of saved states."""
    return -(-tokens // chunk_size(tokens))
