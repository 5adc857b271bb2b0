"""Bounds on the tars that `datasets` reads: it expands each member in memory."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dig_jax.data.images import MAX_BYTES
from dig_jax.errors import UserError

# Members that datasets would decompress, and so could take any amount of memory.
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".npz")


def bound_members(split_generators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a builder's `_split_generators` that reads tars with bounds on their members."""
    return lambda manager: split_generators(_BoundedManager(manager))


class _BoundedManager:
    """A `datasets.DownloadManager` whose archives are bounded."""

    def __init__(self, manager: Any):
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def iter_archive(self, path: str) -> "_Members":
        return _Members(self._manager.iter_archive(path), str(path))


class _Members:
    """The members of a tar, from the start each time."""

    def __init__(self, members: Iterable[tuple[str, Any]], archive: str):
        self._members, self._archive = members, archive

    def __iter__(self) -> Iterator[tuple[str, "_Member"]]:
        for name, file in self._members:
            place = f"member {name!r} of {self._archive}"
            if os.path.splitext(name)[1].lower() in _COMPRESSED:
                raise UserError(f"compressed {place}; expected members that are not compressed")
            yield name, _Member(file, place)


class _Member:
    """A member that is not larger than an image may be, though it may be sparse."""

    def __init__(self, file: Any, place: str):
        self._file, self._place = file, place

    def read(self) -> bytes:
        content = self._file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{self._place} is too large; expected at most {MAX_BYTES // 2**20} MiB")
        return content
