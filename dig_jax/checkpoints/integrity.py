"""Checksums of a checkpoint's files, in the format of `sha256sum --check`.

Orbax detects a missing file, but reads a changed byte as a different number.
"""

import hashlib

from dig_jax.errors import one_line
from dig_jax.files.paths import Path, files_below

CHECKSUM_FILE = "SHA256SUMS"
_ITEMS = ("config", "data", "state")


def write_checksums(directory: Path) -> None:
    """Write the checksums of a checkpoint's files into its directory."""
    lines = [f"{digest}  {name}\n" for name, digest in _checksums(directory).items()]
    (directory / CHECKSUM_FILE).write_text("".join(lines))


def find_corruption(directory: Path) -> str | None:
    """Return a description of the corruption of a checkpoint's files, or None if they are intact."""
    try:
        lines = (directory / CHECKSUM_FILE).read_text().splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        found = _checksums(directory)
    except (OSError, UnicodeDecodeError) as error:
        return one_line(error)
    differing = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    return f"changed, missing or unexpected file: {differing[0]}" if differing else None


def _checksums(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in the checkpoint's items, by relative path."""
    sums = {}
    for path in (path for item in _ITEMS for path in files_below(directory / item)):
        with path.open("rb") as file:
            sums[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
