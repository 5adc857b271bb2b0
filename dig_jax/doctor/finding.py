"""What a check of --mode=doctor returns."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Finding:
    """Lines about one thing.

    Attributes:
        lines: one or more lines of text.
        is_problem: whether something needs to be repaired.
    """

    lines: tuple[str, ...]
    is_problem: bool = False

    @classmethod
    def of(cls, *lines: str) -> "Finding":
        """Return a finding that is no problem."""
        return cls(lines)

    @classmethod
    def problem(cls, *lines: str) -> "Finding":
        """Return a finding that is a problem."""
        return cls(lines, True)
