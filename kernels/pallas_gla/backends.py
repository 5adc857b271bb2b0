"""Chooses the implementation that runs a scan.

An implementation is a module with one function, and says by NotImplementedError what it cannot run:

    forward(q, k, v, g, *, scale, initial_state, segment_ids, grid, direction, chunk_size) -> (o, final_state)

Arguments are as in `pallas_gla.gla_2d`, checked, with `scale` a float, `initial_state` float32 or None, and
`final_state` float32. Tokens come and go in raster order of `grid = (rows, columns)`: ordering them by
`direction` is the implementation's own business, so that a kernel can do it while it loads a tile. A
one-dimensional scan is a grid of one row.
"""

import importlib
from collections.abc import Callable

MODULES = {"reference": "pallas_gla.reference", "xla": "pallas_gla.chunked_xla"}
PALLAS = ("triton", "mosaic")


def select(implementation: str | None, *, interpret: bool | None = None) -> Callable:
    """Returns the `forward` of the named implementation, of the best one for None.

    Raises:
        NotImplementedError: a Pallas kernel is asked for, which this version does not have.
        ValueError: the name is unknown.
    """
    name = "xla" if implementation is None else implementation
    if name in PALLAS or interpret:
        asked = f"implementation={name!r}" if name in PALLAS else "interpret=True"
        raise NotImplementedError(
            f"{asked} needs a Pallas kernel, and this version of pallas_gla has none; "
            f"accepted are None, {', '.join(map(repr, MODULES))}"
        )
    if name not in MODULES:
        known = ", ".join(map(repr, (*MODULES, *PALLAS)))
        raise ValueError(f"implementation must be None or one of {known}, got {name!r}")
    return importlib.import_module(MODULES[name]).forward
