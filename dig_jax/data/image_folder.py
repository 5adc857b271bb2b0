"""Images in one directory per class, such as your own or unpacked ImageNet."""

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dig_jax.data.encoded import EncodedImage, EncodedSource
from dig_jax.data.images import MAX_BYTES
from dig_jax.data.source import fingerprint
from dig_jax.errors import UserError, suggest

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Directories that all have such names are splits, not classes.
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Files in one directory, as `EncodedImages`.

    root: the directory.
    files: paths relative to it, with "/".
    sizes: size of each file in bytes.
    labels: label of each file.
    """

    root: Path
    files: Sequence[str]
    sizes: Sequence[int]
    labels: Int32[np.ndarray, " n"]

    @property
    def identity(self) -> str:
        """Hash of paths, sizes and labels; contents are not read."""
        paths = os.fsencode("\0".join(self.files))
        return fingerprint(paths, np.array(self.sizes, np.int64).tobytes(), self.labels.tobytes())

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> EncodedImage:
        """Read a file.

        Raises:
            UserError: the file is missing, or the file system failed.
        """
        path = self.root / self.files[index]
        try:
            with path.open("rb") as file:
                return EncodedImage(str(path), file.read(MAX_BYTES + 1), int(self.labels[index]))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    def take(self, chosen: Sequence[int]) -> "ImageFiles":
        """Return the files of these indices, in this order."""
        files, sizes = [self.files[i] for i in chosen], [self.sizes[i] for i in chosen]
        return ImageFiles(self.root, files, sizes, self.labels[np.asarray(chosen, int)])


def image_folder(
    split: str,
    path: str = "",
    image_size: int = 256,
    crop: str = "adm",
    heldout_path: str = "",
    heldout_fraction: float = 0.02,
    upright: bool = True,
) -> EncodedSource:
    """Open the images in a directory whose subdirectories are the classes, sorted by name.

    A class may have subdirectories. If `path` has no subdirectories, all images are one class. Hidden files,
    files without an image extension and directories without images are ignored. Links are followed, but
    no directory is entered twice for one class.

    Args:
        split: "train" or "heldout".
        path: the directory.
        image_size: height and width in pixels.
        crop: adm | celeba.
        heldout_path: directory of held-out images with all or some of the classes; "": hold out a fraction
            of `path`.
        heldout_fraction: fraction of the images to hold out, 0 for none. The images are chosen by the hash
            of their paths, so that adding images moves few others between the splits.
        upright: whether to apply the EXIF orientation; ADM, and so the published recipe, does not.

    Raises:
        UserError: a missing directory, no images, or unknown classes.
        ValueError: an invalid option.
    """
    if not path:
        raise ValueError(
            "missing path of the image_folder source; expected the directory of class directories"
        )
    if not 0 <= heldout_fraction < 1:
        raise ValueError(
            f"invalid heldout_fraction={heldout_fraction} of the image_folder source; expected 0 ≤ x < 1"
        )
    images, names = _listed(_directory(path))
    if _SPLIT_NAMES.issuperset(name.lower() for name in names):
        raise UserError(
            f"{images.root} has directories named like splits: {', '.join(names)}; expected one directory per"
            " class. Set path to the split to train on and heldout_path to another"
        )
    if heldout_path:
        if split == "heldout":
            images = _relabel(*_listed(_directory(heldout_path)), names)
    else:
        heldout = _heldout_indices(images, heldout_fraction)
        images = images.take([i for i in range(len(images)) if (i in heldout) == (split == "heldout")])
    return EncodedSource(
        name="image_folder",
        split=split,
        images=images,
        class_names=names,
        image_size=image_size,
        crop=crop,
        upright=upright,
    )


def _directory(path: str) -> Path:
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise UserError(f"no such directory: {str(directory)!r}")
    return directory


@functools.lru_cache(maxsize=2)  # both splits use it, and listing a million files takes seconds
def _listed(root: Path) -> tuple[ImageFiles, tuple[str, ...]]:
    """Return all images under a directory, sorted by class and path, and the names of the classes."""
    classes = _classes(root)
    if not classes:
        raise UserError(
            f"no images in {root}; expected one directory per class with {', '.join(EXTENSIONS)} files"
        )
    files, sizes = zip(*itertools.chain(*classes.values()), strict=True)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), list(map(len, classes.values())))
    return ImageFiles(root, files, sizes, labels), tuple(classes)


def _classes(root: Path) -> dict[str, list[tuple[str, int]]]:
    """Return path and size of the images of each class."""
    top, entered = _entries(root), _identity(os.stat(root))
    found = {
        entry.name: sorted(_images(entry, f"{entry.name}/", {entered})) for entry in top if entry.is_dir()
    }
    loose = [(entry.name, entry.stat().st_size) for entry in top if _is_image(entry)]
    classes = {name: images for name, images in found.items() if images}
    if loose and not classes:
        classes, loose = {root.resolve().name or "images": loose}, []
    _warn_of_ignored(root, len(loose), [name for name in found if name not in classes])
    return classes


def _warn_of_ignored(root: Path, loose: int, empty: list[str]) -> None:
    if loose:
        log.warning("ignored %d images in %s that are not in a class directory", loose, root)
    if empty:
        shown = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        log.warning("ignored %d directories without images in %s: %s", len(empty), root, shown)


def _images(directory: os.DirEntry, prefix: str, entered: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Yield path and size of the images in a directory and its subdirectories."""
    identity = _identity(directory.stat())
    if identity in entered:
        return
    entered.add(identity)
    for entry in _entries(directory.path):
        if entry.is_dir():
            yield from _images(entry, f"{prefix}{entry.name}/", entered)
        elif _is_image(entry):
            yield prefix + entry.name, entry.stat().st_size


def _entries(directory: str | Path) -> list[os.DirEntry]:
    with os.scandir(directory) as entries:
        return sorted(filter(_is_visible, entries), key=lambda entry: entry.name)


def _is_visible(entry: os.DirEntry) -> bool:
    """Return whether an entry is neither hidden nor a broken link."""
    return not entry.name.startswith(".") and (not entry.is_symlink() or os.path.exists(entry.path))


def _is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and entry.is_file()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _heldout_indices(images: ImageFiles, fraction: float) -> set[int]:
    """Return the indices of the images to hold out: at least one unless the fraction is 0."""
    if not fraction:
        return set()
    if len(images) < 2:
        raise UserError(
            f"too few images in {images.root} for heldout_fraction={fraction}: got 1; expected at least 2, or"
            " heldout_fraction=0"
        )
    hashes = [hashlib.sha256(os.fsencode(file)).digest() for file in images.files]
    ranked = sorted(range(len(images)), key=hashes.__getitem__)
    return set(ranked[: min(max(1, round(fraction * len(images))), len(images) - 1)])


def _relabel(images: ImageFiles, names: tuple[str, ...], expected: tuple[str, ...]) -> ImageFiles:
    """Return images with the labels that their classes have in training."""
    unknown = sorted(set(names) - set(expected))
    if len(names) == len(expected) == 1:
        return images
    if unknown:
        hint = suggest(unknown[0], expected)
        raise UserError(f"unknown class {unknown[0]!r} in {images.root}; expected training classes{hint}")
    label = np.array([expected.index(name) for name in names], np.int32)
    return dataclasses.replace(images, labels=label[images.labels])
