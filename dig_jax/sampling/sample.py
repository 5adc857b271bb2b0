"""--mode=sample: any number of images in one npz file, drawn by all processes.

An image depends only on its seed and label, so any process can draw any part of a set. Finished images are
kept in WORKDIR/generated, in chunks; once all are there, WORKDIR/generated.npz replaces the directory.
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
from dig_jax.errors import ConfigError, UserError, naming_directory, naming_setting, one_line
from dig_jax.files.atomic import replacing, write_json
from dig_jax.parallel import barrier, check_shared_directory, local_mesh, on_process_0
from dig_jax.progress import Progress
from dig_jax.reporting.grids import save_grid
from dig_jax.sampling.sampler import Labels, Sampler, load

log = logging.getLogger(__name__)

# Number of images in generated.png.
_SHOWN = 100
# Fields of `sampling` that do not affect the images.
_IRRELEVANT = ("every_steps", "images_per_class")


def sample(
    settings: Config,
    workdir: Path,
    labels: Callable[[Sequence[str]], Labels] = lambda class_names: None,
    seeds: Int[np.ndarray, " n"] | None = None,
) -> None:
    """Draw images from a workdir's newest checkpoint into generated.npz and, if possible, generated.png.

    The npz file holds `arr_0`, uint8 [N, height, width, C], as ADM's evaluator reads it, `labels` and
    `seeds`. generated.png is written only for grayscale and RGB images. If a run was interrupted, the
    same call draws only the missing images.

    Args:
        settings: `sampling` and `autoencoder` may differ from the checkpoint's; most other fields may not.
        labels: a function of the class names that returns the `labels` for `Sampler.__call__`.
        seeds: as in `Sampler.__call__`. Without labels and seeds, one image of each class is drawn.

    Raises:
        UserError: no checkpoint, settings that differ, invalid labels or seeds, or WORKDIR/generated holds
            a different set of images.
    """
    sampler = load(workdir, settings=settings, mesh=local_mesh())
    names = sampler.components.image_spec.class_names
    chosen = labels(names)
    if chosen is None and seeds is None:
        seeds = np.arange(max(len(names), 1))
    with naming_setting("--labels or --seeds"):
        indices, seeds = sampler.resolve(chosen, seeds)
    images = _ImageSet(workdir / "generated", sampler, indices, seeds)
    on_process_0(images.claim)
    check_shared_directory(workdir)
    images.draw(index=jax.process_index(), count=jax.process_count())
    barrier("images are drawn")
    on_process_0(lambda: _collect(images, workdir, names))
    log.info("wrote %d images of step %d to %s", len(seeds), sampler.step, workdir / "generated.npz")


@dataclasses.dataclass(frozen=True, eq=False)
class _ImageSet:
    """A set of images in a directory, with `sampling.batch_size` images per file."""

    directory: Path
    sampler: Sampler
    labels: Int[np.ndarray, " n"]
    seeds: Int[np.ndarray, " n"]

    @property
    def chunk_size(self) -> int:
        return self.sampler.components.config.sampling.batch_size

    def identity(self) -> dict[str, Any]:
        """Return everything that the images depend on."""
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
        """Create the directory, or check that it holds chunks of this set.

        Raises:
            UserError: it holds anything else, or is not writable.
        """
        path, identity = self.directory / "set.json", self.identity()
        with naming_directory(self.directory):
            if path.exists():
                stored = _read_object(path)
                changed = [
                    f"{name}: {stored.get(name)} → {value}"
                    for name, value in identity.items()
                    if stored.get(name) != value
                ]
                if changed:
                    raise ConfigError(
                        f"{self.directory} contains a different set of images ({'; '.join(changed)});"
                        " restore those settings or delete the directory"
                    )
            elif any(self.directory.glob("[!.]*")):
                raise ConfigError(f"{self.directory} contains other files; move them to another directory")
            self.directory.mkdir(exist_ok=True)
            write_json(path, identity)

    def draw(self, *, index: int, count: int) -> None:
        """Draw the missing chunks of process `index` out of `count`."""
        missing = [
            first for first in range(0, len(self.seeds), self.chunk_size) if not self._is_intact(first)
        ]
        done = len(self.seeds) - sum(len(self.seeds[first : first + self.chunk_size]) for first in missing)
        # Divide by position in the set, not among the missing chunks: other processes may draw already.
        own = [first for first in missing if first // self.chunk_size % count == index]
        if done:
            log.info("%d of %d images already exist", done, len(self.seeds))
        progress = Progress("image", first=done, total=len(self.seeds), every_seconds=10.0)
        for number, first in enumerate(own, 1):
            chosen = slice(first, first + self.chunk_size)
            with naming_setting("config.sampling"):
                images = self.sampler(self.labels[chosen], seeds=self.seeds[chosen])
            with naming_directory(self.directory), replacing(self._path(first)) as file:
                np.save(file, images)
            if index == 0:
                progress.show(min(done + number * count * self.chunk_size, len(self.seeds)))
        if own:
            progress.close()

    def read(self) -> Iterator[UInt8[np.ndarray, "n height width channels"]]:
        """Yield the images, chunk by chunk."""
        for first in range(0, len(self.seeds), self.chunk_size):
            if not self._is_intact(first):
                raise UserError(
                    f"{self._path(first)} is missing or corrupt; run the same command to draw it again"
                )
            yield np.load(self._path(first))

    def delete(self) -> None:
        """Delete the chunks, then set.json: an interruption never leaves chunks of an unknown set."""
        for path in self.directory.glob("*.npy"):
            path.unlink()
        shutil.rmtree(self.directory)

    def _path(self, first: int) -> Path:
        return self.directory / f"{first:08}.npy"

    def _is_intact(self, first: int) -> bool:
        count = min(self.chunk_size, len(self.seeds) - first)
        try:
            chunk = np.load(self._path(first), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return chunk.dtype == np.uint8 and chunk.shape == (count, *self.sampler.output_shape)


def _collect(images: _ImageSet, workdir: Path, names: tuple[str, ...]) -> None:
    """Replace the chunks by generated.npz and a grid of the first images."""
    with naming_directory(workdir):
        shown = _write_npz(images, workdir / "generated.npz")
        grid = workdir / "generated.png"
        grid.unlink(missing_ok=True)
        if shown.shape[-1] in (1, 3):
            titles = [display_name(names[label]) for label in images.labels[:_SHOWN]] if names else ()
            columns = min(len(shown), images.sampler.components.config.sampling.images_per_class)
            save_grid(grid, shown, columns=columns, titles=titles)
        images.delete()


def _write_npz(images: _ImageSet, path: Path) -> UInt8[np.ndarray, "n height width channels"]:
    """Write the npz file and return the first images."""
    shape, shown = (len(images.seeds), *images.sampler.output_shape), []
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        # Chunk by chunk: np.savez would need all images in memory.
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for chunk in images.read():
                member.write(chunk.tobytes())
                if sum(map(len, shown)) < _SHOWN:
                    shown.append(chunk)
        for name in ("labels", "seeds"):
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, getattr(images, name))
    return np.concatenate(shown)[:_SHOWN]


def _digest(arrays: Iterable[Array | np.ndarray]) -> str:
    """Return a hexadecimal hash of the values of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}; delete {path.parent}") from error
