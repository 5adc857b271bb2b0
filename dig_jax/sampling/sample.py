"""Sets of generated images, of any number: drawn by all processes, continued where a run ended, one npz.

An image depends on its seed and label alone, so a set is drawn in parts by whoever is there. They lie in
WORKDIR/generated until all are; then WORKDIR/generated.npz takes their place.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, UInt8

from dig_jax.config import Config, to_dict
from dig_jax.data.class_names import display_name
from dig_jax.errors import ConfigError, UserError, naming_directory, naming_setting
from dig_jax.files.atomic import replacing, write_json
from dig_jax.parallel import barrier, check_shared_directory, local_mesh, on_process_0
from dig_jax.progress import Progress
from dig_jax.reporting.grids import save_grid
from dig_jax.sampling.sampler import Labels, Sampler, load

log = logging.getLogger(__name__)

# Images in generated.png: more would not be looked at.
_SHOWN = 100
# Settings of `sampling` that the images do not depend on.
_IRRELEVANT = ("every_steps", "images_per_class")


def sample(
    settings: Config,
    workdir: Path,
    labels: Callable[[Sequence[str]], Labels] = lambda class_names: None,
    seeds: Int[np.ndarray, " n"] | None = None,
) -> None:
    """Draws images from a workdir's newest checkpoint into generated.npz and, if grey or RGB, generated.png.

    The npz holds `arr_0`, uint8 [N, height, width, C], as evaluators of the field read it, and beside it
    `labels` and `seeds`. What a run that ended has drawn is not drawn again.

    Args:
        settings: its `sampling` and `autoencoder` decide how; the rest must be what the workdir began with.
        labels: those of a call of `Sampler`, given the names of the classes.
        seeds: as there. Neither: one image of each class.

    Raises:
        UserError: no checkpoint, other settings, or labels or seeds that cannot be; parts of another set.
    """
    sampler = load(workdir, settings=settings, mesh=local_mesh())
    names = sampler.components.image_spec.class_names
    chosen = labels(names)
    if chosen is None and seeds is None:
        seeds = np.arange(max(len(names), 1))
    with naming_setting("--labels or --seeds"):
        numbers, seeds = sampler.resolve(chosen, seeds)
    parts = _Parts(workdir / "generated", sampler, numbers, seeds)
    on_process_0(parts.claim)
    check_shared_directory(workdir)
    parts.draw(index=jax.process_index(), count=jax.process_count())
    barrier("images are drawn")
    on_process_0(lambda: _collect(parts, workdir, names))
    log.info("%d images of step %d are in %s", len(seeds), sampler.step, workdir / "generated.npz")


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """The images of a set, `sampling.batch_size` in a file."""

    directory: Path
    sampler: Sampler
    labels: Int[np.ndarray, " n"]
    seeds: Int[np.ndarray, " n"]

    @property
    def size(self) -> int:
        return self.sampler.components.config.sampling.batch_size

    def described(self) -> dict[str, Any]:
        """What the images depend on."""
        components = self.sampler.components
        options = to_dict(components.config.sampling)
        return {
            "step": self.sampler.step,
            "parameters": components.config.sampled_ema,
            "values of the parameters": _digest(jax.tree.leaves(self.sampler.params)),
            **{name: value for name, value in options.items() if name not in (*_IRRELEVANT, "ema")},
            "autoencoder": components.autoencoder.fingerprint() if components.autoencoder else "",
            "autoencoder.dtype": components.config.autoencoder.dtype,
            "images": len(self.seeds),
            "labels and seeds": _digest([self.labels, self.seeds]),
        }

    def claim(self) -> None:
        """Makes the directory, unless there are parts of another set or other things in it.

        Raises:
            UserError: there are, or it cannot be written to.
        """
        path, ours = self.directory / "set.json", self.described()
        with naming_directory(self.directory):
            if path.exists():
                theirs = _read(path)
                changed = [
                    f"{name}: {theirs.get(name)} → {value}"
                    for name, value in ours.items()
                    if theirs.get(name) != value
                ]
                if changed:
                    raise ConfigError(
                        f"{self.directory} has parts of another set ({'; '.join(changed)}): give the settings"
                        " that it began with, or delete it"
                    )
            elif any(self.directory.glob("[!.]*")):
                raise ConfigError(f"{self.directory} has other things than a set in it: move them elsewhere")
            self.directory.mkdir(exist_ok=True)
            write_json(path, ours)

    def draw(self, *, index: int, count: int) -> None:
        """Draws those parts which are not there, of every `count` the one with this index."""
        missing = [first for first in range(0, len(self.seeds), self.size) if not self._is_whole(first)]
        done = len(self.seeds) - sum(len(self.seeds[first : first + self.size]) for first in missing)
        # Not every count-th of what is missing: others may be drawing already.
        own = [first for first in missing if first // self.size % count == index]
        if done:
            log.info("%d of %d images are there already", done, len(self.seeds))
        progress = Progress("image", first=done, total=len(self.seeds), every_seconds=10.0)
        for number, first in enumerate(own, 1):
            chosen = slice(first, first + self.size)
            with naming_setting("config.sampling"):
                images = self.sampler(self.labels[chosen], seeds=self.seeds[chosen])
            with naming_directory(self.directory), replacing(self._path(first)) as file:
                np.save(file, images)
            if index == 0:
                progress.show(min(done + number * count * self.size, len(self.seeds)))
        if own:
            progress.close()

    def read(self) -> Iterator[UInt8[np.ndarray, "n height width channels"]]:
        """The images, part by part."""
        for first in range(0, len(self.seeds), self.size):
            if not self._is_whole(first):
                raise UserError(f"{self._path(first)} is gone or damaged: the same command draws it again")
            yield np.load(self._path(first))

    def delete(self) -> None:
        """Deletes the parts, and only then what says which set they are of."""
        for path in self.directory.glob("*.npy"):
            path.unlink()
        shutil.rmtree(self.directory)

    def _path(self, first: int) -> Path:
        return self.directory / f"{first:08}.npy"

    def _is_whole(self, first: int) -> bool:
        count = min(self.size, len(self.seeds) - first)
        try:
            part = np.load(self._path(first), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return part.dtype == np.uint8 and part.shape == (count, *self.sampler.picture_shape)


def _collect(parts: _Parts, workdir: Path, names: tuple[str, ...]) -> None:
    """One file of all parts, and a picture of the first images."""
    with naming_directory(workdir):
        shown = _write_npz(parts, workdir / "generated.npz")
        picture = workdir / "generated.png"
        picture.unlink(missing_ok=True)
        if shown.shape[-1] in (1, 3):
            titles = [display_name(names[label]) for label in parts.labels[:_SHOWN]] if names else ()
            columns = min(len(shown), parts.sampler.components.config.sampling.images_per_class)
            save_grid(picture, shown, columns=columns, titles=titles)
        parts.delete()


def _write_npz(parts: _Parts, path: Path) -> UInt8[np.ndarray, "n height width channels"]:
    """The npz of a set, of which it gives the first images."""
    shape, shown = (len(parts.seeds), *parts.sampler.picture_shape), []
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        # One part at a time: np.savez would hold all of them.
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for images in parts.read():
                member.write(images.tobytes())
                if sum(map(len, shown)) < _SHOWN:
                    shown.append(images)
        for name in ("labels", "seeds"):
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, getattr(parts, name))
    return np.concatenate(shown)[:_SHOWN]


def _digest(arrays: Iterable[Array | np.ndarray]) -> str:
    """Hash of the values of arrays, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete {path.parent}") from error
