"""The small sample grids of a run as pictures inside a page, in few bytes."""

import base64
import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

# More grids than these would not be told apart on a slider; and all together have so many bytes at most.
_GRIDS, _BYTES = 40, 1_200_000


def sample_grids(workdir: Path) -> list[tuple[int, str]]:
    """(step, data URI) of WORKDIR/samples/STEP.png by rising step; the first, the last, and some between."""
    found = {int(path.stem): path for path in (workdir / "samples").glob("*.png") if path.stem.isdigit()}
    steps, encode = sorted(found), functools.cache(_uri)
    for count in range(min(_GRIDS, len(steps)), 0, -1):
        # Of one, the last.
        places = np.linspace(len(steps) - 1, 0, count).round().astype(int)[::-1]
        grids = [(steps[place], encode(found[steps[place]])) for place in places]
        readable = [(step, uri) for step, uri in grids if uri]
        if sum(len(uri) for _, uri in readable) <= _BYTES:
            return readable
    return []


def _uri(path: Path) -> str | None:
    """The picture, as JPEG where that takes fewer bytes, as it does of photographs; None: unreadable."""
    try:
        png = path.read_bytes()
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=85)
    except (OSError, UnidentifiedImageError):
        return None
    jpeg = buffer.getvalue()
    kind, content = ("png", png) if len(png) <= len(jpeg) else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
