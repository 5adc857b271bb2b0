"""The mixers of consecutive blocks as text: "gla*3+softmax" is three blocks with GLA and one with softmax."""

import re

from dig_jax.errors import alternatives, suggest

MIXERS = ("gla", "softmax", "local")


def parse_pattern(text: str) -> tuple[str, ...]:
    """Return the mixer of each block of a pattern.

    Raises:
        ValueError: an unknown mixer or a malformed pattern.
    """
    mixers: list[str] = []
    for part in text.split("+"):
        match = re.fullmatch(r"\s*(\w+)\s*(?:\*\s*([1-9]\d?))?\s*", part)
        if match is None:
            raise ValueError(
                f"invalid mixer={text!r}: got {part!r}; expected mixers with counts, such as 'gla*3+softmax'"
            )
        if match[1] not in MIXERS:
            raise ValueError(
                f"invalid mixer={text!r}: unknown mixer {match[1]!r}{suggest(match[1], MIXERS)}; expected"
                f" {alternatives(MIXERS)}, or a pattern such as 'gla*3+softmax'"
            )
        mixers += [match[1]] * int(match[2] or 1)
    return tuple(mixers)
