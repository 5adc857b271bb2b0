"""The files of a run whose workdir is in object storage, where nothing can be appended to.

They are written to a local folder, and `push` uploads those that changed. Only the checkpoints, the sets of
images and the features of an evaluation are written to object storage directly.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from dig_jax.files import paths
from dig_jax.files.paths import Path

# What a later start continues or shows; nothing else is downloaded.
_CONTINUED = (
    "config.json",
    "metrics.jsonl",
    "samples",
    "scores.json",
    "starts.jsonl",
    "sweep.json",
    "wandb_id.txt",
)


class LocalFolder:
    """A local folder that stands for a workdir.

    Attributes:
        folder: the workdir itself if it is local; else a temporary folder with the files that a run
            continues.
    """

    def __init__(self, workdir: Path, folder: pathlib.Path):
        self.folder, self._workdir = folder, workdir
        self._pushed: dict[pathlib.Path, tuple[int, int]] = {}
        if workdir == folder:
            return
        for name in _CONTINUED:
            self._pull(name)
        self._pushed = self._changed()

    def push(self) -> None:
        """Upload the files that changed since the last call. Nothing happens if the workdir is local.

        Raises:
            OSError: uploading failed; the next call tries again.
        """
        if self._workdir == self.folder:
            return
        for path, version in self._changed().items():
            paths.upload(path, self._workdir / path.relative_to(self.folder).as_posix())
            self._pushed[path] = version

    def _pull(self, name: str) -> None:
        source = self._workdir / name
        if source.is_dir():
            for child in paths.children(source):
                self._pull(f"{name}/{child.name}")
        elif source.exists():
            target = self.folder / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())

    def _changed(self) -> dict[pathlib.Path, tuple[int, int]]:
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        versions = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}
        return {path: version for path, version in versions.items() if self._pushed.get(path) != version}


@contextlib.contextmanager
def local_folder(workdir: Path) -> Iterator[LocalFolder]:
    """Yield the local folder of a workdir; upload what changed at the end, also after an error."""
    if not paths.is_remote(workdir):
        yield LocalFolder(workdir, pathlib.Path(workdir))
        return
    with tempfile.TemporaryDirectory() as folder:
        local = LocalFolder(workdir, pathlib.Path(folder))
        try:
            yield local
        except BaseException:
            with contextlib.suppress(OSError):  # the first error counts
                local.push()
            raise
        local.push()
