"""The largest batch that fits, in few compilations."""

from collections.abc import Callable

# Powers of two and the halves between: 1, 2, 3, 4, 6, 8, 12, …
SIZES = sorted({1} | {m * 2**e for e in range(13) for m in (2, 3)})


def largest_fitting(
    needed: Callable[[int], float], start: int, fixed: int, limit: float, attempts: int = 4
) -> int:
    """The largest size, of `SIZES` and `start`, whose memory stays below a limit; 0 if there is none.

    Memory is taken for linear in the size between those measured: the next size to try is what the line
    through the nearest two allows. What is returned was measured.

    Args:
        needed: bytes for a size; slow.
        start: a size to begin with.
        fixed: bytes that no size can do without.
        limit: bytes.
        attempts: how often `needed` is asked at most.
    """
    if fixed > limit:
        return 0
    sizes = sorted({*SIZES, start})
    known = {0: fixed, start: needed(start)}
    for _ in range(attempts - 1):
        low = max(size for size, used in known.items() if used <= limit)
        high = min((size for size, used in known.items() if used > limit), default=sizes[-1] + 1)
        between = [size for size in sizes if low < size < high]
        (a, used_a), (b, used_b) = sorted(known.items(), key=lambda item: abs(item[1] - limit))[:2]
        slope = (used_b - used_a) / (b - a)
        allowed = [size for size in between if used_a + slope * (size - a) <= limit]
        if not between or (not allowed and 0 not in (a, b)):
            break
        size = max(allowed, default=between[0])
        known[size] = needed(size)
    return max(size for size, used in known.items() if used <= limit)
