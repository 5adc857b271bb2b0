"""Names of power-function averages of the parameters (Karras et al. 2024, EDM2), such as length-0.1."""

LONGEST = 12**-0.5
"""The relative length of a mean over all updates, which no other average reaches."""

_PREFIX = "length-"


def average_of_length(length: float) -> str:
    """Return the name of the average of a relative length."""
    return f"{_PREFIX}{length}"


def length_of(name: str) -> float | None:
    """Return the relative length in the name of an average, or None for averages of other kinds."""
    try:
        length = float(name.removeprefix(_PREFIX))
    except ValueError:
        return None
    return length if name.startswith(_PREFIX) and 0 < length < LONGEST else None
