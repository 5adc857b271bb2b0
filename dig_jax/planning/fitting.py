"""Find the largest batch that fits in few compilations."""

from collections.abc import Callable, Mapping, Sequence

# Powers of two and the values halfway between: 1, 2, 3, 4, 6, 8, 12, …
SIZES = sorted({1} | {m * 2**e for e in range(13) for m in (2, 3)})


def largest_fitting(
    needed: Callable[[int], float], start: int, fixed: int, limit: float, attempts: int = 4
) -> int:
    """Return the largest measured size, from `SIZES` or `start`, that fits; 0 if none fits.

    Args:
        needed: bytes for a size; slow.
        start: the first size to measure.
        fixed: bytes for size 0.
        limit: bytes that are available.
        attempts: maximum number of measurements.
    """
    if fixed > limit:
        return 0
    sizes = sorted({*SIZES, start})
    measured = {0: fixed, start: needed(start)}
    for _ in range(attempts - 1):
        size = _next_size(sizes, measured, limit)
        if size is None:
            break
        measured[size] = needed(size)
    return max(size for size, used in measured.items() if used <= limit)


def _next_size(sizes: Sequence[int], measured: Mapping[int, int | float], limit: float) -> int | None:
    """Return the largest size that fits by linear interpolation; None if none is left to measure."""
    low = max(size for size, used in measured.items() if used <= limit)
    high = min((size for size, used in measured.items() if used > limit), default=sizes[-1] + 1)
    between = [size for size in sizes if low < size < high]
    (a, used_a), (b, used_b) = sorted(measured.items(), key=lambda item: abs(item[1] - limit))[:2]
    slope = (used_b - used_a) / (b - a)
    allowed = [size for size in between if used_a + slope * (size - a) <= limit]
    if not between or (not allowed and 0 not in (a, b)):
        return None
    return max(allowed, default=between[0])
