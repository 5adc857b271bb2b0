"""Images in one directory per class, such as your own or unpacked ImageNet."""

import dataclasses
import functools
import hashlib
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dig_jax.data.encoded import EncodedImage, EncodedSource
from dig_jax.data.images import HAS_AVIF, MAX_BYTES
from dig_jax.data.options import OptionError
from dig_jax.data.source import Source, fingerprint
from dig_jax.errors import UserError, suggest
from dig_jax.files.paths import is_remote, to_path

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
EXTENSIONS += (".ppm", ".pgm", ".pbm", *([".avif"] if HAS_AVIF else []))
# Directories that all have such names are splits, not classes.
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_SHOWN = 5  # names in a message


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

    def read(self, index: int, limit: int | None = None) -> EncodedImage:
        """Read a file, or its first `limit` bytes.

        Raises:
            UserError: the file is missing or no longer a regular file, or the file system failed.
        """
        path = self.root / self.files[index]
        try:
            with open(path, "rb", opener=_without_waiting) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise UserError(f"cannot read {path}: not a regular file")
                data = file.read(limit or MAX_BYTES + 1)
                return EncodedImage(str(path), data, int(self.labels[index]))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def take(self, chosen: Sequence[int]) -> "ImageFiles":
        """Return the files of these indices, in this order."""
        files, sizes = [self.files[i] for i in chosen], [self.sizes[i] for i in chosen]
        return ImageFiles(self.root, files, sizes, self.labels[np.asarray(chosen, int)])


class _Listing(NamedTuple):
    """The images under a directory, the names of their classes, and what was left out."""

    images: ImageFiles
    names: tuple[str, ...]
    notes: tuple[str, ...]


def image_folder(
    split: str,
    path: str = "",
    image_size: int | tuple[int, int] = 256,
    crop: str = "adm",
    channels: int = 3,
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
        image_size: height and width in pixels, or one number for both.
        crop: adm | celeba.
        channels: 3 for RGB, 1 for gray.
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
        raise OptionError("image_folder", "heldout_fraction", heldout_fraction, "0 ≤ x < 1")
    images, names, notes = _listed(_directory(path))
    if _SPLIT_NAMES.issuperset(name.lower() for name in names):
        raise UserError(
            f"{images.root} has directories named like splits: {', '.join(names)}; expected one directory per"
            " class. Set path to the split to train on and heldout_path to another"
        )
    if heldout_path:
        if split == "heldout":
            listing = _listed(_directory(heldout_path))
            images, notes = _relabel(listing.images, listing.names, names), listing.notes
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
        channels=channels,
        notes=notes,
    )


def folder(source: Source) -> Path | None:
    """Return the directory of a source's image files; None for sources without such a directory."""
    images = getattr(source, "images", None)
    return images.root if isinstance(images, ImageFiles) else None


def _directory(path: str) -> Path:
    if is_remote(to_path(path)):
        raise UserError(
            f"unsupported path {path!r} of images in object storage; mount the bucket (docs/guide/data.md)"
        )
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise UserError(f"no such directory: {str(directory)!r}")
    return directory


@functools.lru_cache(maxsize=2)  # both splits use it, and listing a million files takes seconds
def _listed(root: Path) -> _Listing:
    """Return all images under a directory, sorted by class and path."""
    others: Counter[str] = Counter()
    classes, notes = _classes(root, others)
    if others:
        notes.append(f"ignored {others.total():,} other files: {_counted(others)}")
    if not classes:
        found = f", found {_counted(others)}" if others else ""
        raise UserError(
            f"no images in {root}{found}; expected one directory per class with {', '.join(EXTENSIONS)} files"
        )
    files, sizes = zip(*itertools.chain(*classes.values()), strict=True)
    if hint := _hint(root, files, tuple(classes)):
        notes.append(hint)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), list(map(len, classes.values())))
    names = tuple(os.fsencode(name).decode(errors="surrogateescape") for name in classes)  # in every locale
    return _Listing(ImageFiles(root, files, sizes, labels), names, tuple(notes))


def _classes(root: Path, others: Counter[str]) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Return path and size of the images of each class, and notes; count other files by extension."""
    top, entered, notes = _entries(root), _identity(os.stat(root)), []
    found = {
        entry.name: sorted(_images(entry, f"{entry.name}/", {entered}, others))
        for entry in top
        if entry.is_dir()
    }
    loose = [(entry.name, entry.stat().st_size) for entry in top if _is_image(entry, others)]
    classes = {name: images for name, images in found.items() if images}
    if loose and not classes:
        classes, loose = {root.resolve().name or "images": loose}, []
    if loose:
        notes.append(f"ignored {len(loose):,} images in {root} that are not in a class directory")
    if empty := [name for name in found if name not in classes]:
        notes.append(f"ignored {len(empty):,} directories without images in {root}: {_first(empty)}")
    return classes, notes


def _hint(root: Path, files: Sequence[str], classes: tuple[str, ...]) -> str:
    """Return a note if the only class holds directories alone, which may be the classes."""
    directories = sorted({os.path.dirname(file) for file in files})
    common = os.path.commonpath(directories)
    if len(classes) != 1 or not common or common in directories:
        return ""
    names = sorted({directory[len(common) + 1 :].partition("/")[0] for directory in directories})
    return (
        f"all images are one class, {classes[0]!r}, and lie in {len(names)} directories of {common}:"
        f" {_first(names)}; if these are the classes, set path to {root / common}"
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _counted(extensions: Counter[str]) -> str:
    return _first([f"{count:,} {extension}" for extension, count in extensions.most_common()])


def _images(
    directory: os.DirEntry, prefix: str, entered: set[tuple[int, int]], others: Counter[str]
) -> Iterator[tuple[str, int]]:
    """Yield path and size of the images in a directory and below; count other files by extension."""
    identity = _identity(directory.stat())
    if identity in entered:
        return
    entered.add(identity)
    for entry in _entries(directory.path):
        if entry.is_dir():
            yield from _images(entry, f"{prefix}{entry.name}/", entered, others)
        elif _is_image(entry, others):
            yield prefix + entry.name, entry.stat().st_size


def _entries(directory: str | Path) -> list[os.DirEntry]:
    with os.scandir(directory) as entries:
        return sorted(filter(_is_visible, entries), key=lambda entry: entry.name)


def _is_visible(entry: os.DirEntry) -> bool:
    """Return whether an entry is neither hidden nor a broken link."""
    return not entry.name.startswith(".") and (not entry.is_symlink() or os.path.exists(entry.path))


def _is_image(entry: os.DirEntry, others: Counter[str]) -> bool:
    """Return whether an entry is a file with an image's extension; count other files by theirs."""
    if not entry.is_file():
        return False
    extension = os.path.splitext(entry.name)[1].lower()
    if extension in EXTENSIONS:
        return True
    others[extension or "without extension"] += 1
    return False


def _without_waiting(path: str, flags: int) -> int:
    """Open a file. A pipe, which may have taken its place since the listing, would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
