"""The sample grids of a run as data URIs, limited in number and size."""

import base64
import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

# Limits of the page: number of grids on the slider, and bytes of all data URIs together.
_GRIDS, _BYTES = 40, 1_200_000


def embedded_grids(workdir: Path) -> list[tuple[int, str]]:
    """Return (step, data URI) of the grids WORKDIR/samples/STEP.png, in order of steps.

    If there are too many, an evenly spaced subset with the first and the last is returned. Unreadable files
    are skipped.
    """
    found = {int(path.stem): path for path in (workdir / "samples").glob("*.png") if path.stem.isdigit()}
    steps, encode = sorted(found), functools.cache(_data_uri)
    for count in range(min(_GRIDS, len(steps)), 0, -1):
        # Reversed, so that a single grid is the last one.
        chosen = np.linspace(len(steps) - 1, 0, count).round().astype(int)[::-1]
        grids = [(steps[index], encode(found[steps[index]])) for index in chosen]
        readable = [(step, uri) for step, uri in grids if uri]
        if sum(len(uri) for _, uri in readable) <= _BYTES:
            return readable
    return []


def _data_uri(path: Path) -> str | None:
    """Return the picture as PNG or JPEG, whichever is smaller; None if it is unreadable."""
    try:
        png = path.read_bytes()
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=85)
    except (OSError, UnidentifiedImageError):
        return None
    jpeg = buffer.getvalue()
    kind, content = ("png", png) if len(png) <= len(jpeg) else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
