"""Images in a directory per class, anybody's own or ImageNet as it is unpacked."""

import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from dig_jax.data.encoded import EncodedSource, Record
from dig_jax.data.images import MAX_BYTES
from dig_jax.data.source import fingerprint
from dig_jax.errors import UserError, suggest

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Directories of these names alone are taken for what they are.
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Files of one directory, as `Records`.

    root: the directory.
    files: paths in it, with "/".
    sizes: of each, in bytes.
    labels: of each.
    """

    root: Path
    files: Sequence[str]
    sizes: Sequence[int]
    labels: Int32[np.ndarray, " n"]

    @functools.cached_property
    def identity(self) -> str:
        """Hash of names, sizes and labels; contents are not read."""
        named = os.fsencode("\0".join(self.files))
        return fingerprint(named, np.array(self.sizes, np.int64).tobytes(), self.labels.tobytes())

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Record:
        """The file's content.

        Raises:
            UserError: it is gone, or the file system fails.
        """
        path = self.root / self.files[index]
        try:
            with path.open("rb") as file:
                return Record(str(path), file.read(MAX_BYTES + 1), int(self.labels[index]))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error

    def take(self, chosen: Sequence[int]) -> "ImageFiles":
        """Those of these indices, in this order."""
        files, sizes = ([values[i] for i in chosen] for values in (self.files, self.sizes))
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
    """The images in a directory, whose subdirectories are the classes, in the order of their names.

    A class's images may lie in directories of its own. Without subdirectories all images are one class.
    Hidden files, files without an image's extension and directories without images do not count; a link to a
    directory is followed, but no directory is entered twice for one class.

    Args:
        split: "train" or "heldout".
        path: the directory.
        image_size: height and width in pixels.
        crop: adm | celeba.
        heldout_path: a directory of held-out images with the same classes, or some of them; "": a part of
            `path` is held out.
        heldout_fraction: which part, 0 for none; chosen by the hash of the file's name, so that an image
            seldom changes sides when others come.
        upright: turn images as their EXIF orientation says, which ADM, and so the published recipe, does not.

    Raises:
        UserError: a directory that is not there or has no images, or classes that differ.
        ValueError: a setting that cannot be.
    """
    if not path:
        raise ValueError("path of the image_folder source is missing: a directory with one per class in it")
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction={heldout_fraction} is not from 0 to below 1")
    images, names = _listed(_directory(path))
    if _SPLITS.issuperset(name.lower() for name in names):
        raise UserError(
            f"the directories of {images.root} are no classes but splits: {', '.join(names)}; set path to the"
            " one to train on, and heldout_path to another"
        )
    if heldout_path:
        if split == "heldout":
            images = _relabelled(*_listed(_directory(heldout_path)), names)
    else:
        held_out = _held_out(images, heldout_fraction)
        images = images.take([i for i in range(len(images)) if (i in held_out) == (split == "heldout")])
    return EncodedSource(
        name="image_folder",
        split=split,
        records=images,
        class_names=names,
        image_size=image_size,
        crop=crop,
        upright=upright,
    )


def _directory(path: str) -> Path:
    directory = Path(path).expanduser().absolute()
    if not directory.is_dir():
        raise UserError(f"there is no directory {str(directory)!r}")
    return directory


@functools.lru_cache(maxsize=2)  # both splits ask, and a million files take seconds
def _listed(root: Path) -> tuple[ImageFiles, tuple[str, ...]]:
    """All images under a directory, by class and path, and the names of the classes."""
    top = _entries(root)
    found: list[tuple[str, int]] = []
    labels, names, empty = [], [], []
    for entry in top:
        if entry.is_dir():
            images = sorted(_images(entry, f"{entry.name}/", {_identity(os.stat(root))}))
            if not images:
                empty.append(entry.name)
                continue
            labels += [len(names)] * len(images)
            names.append(entry.name)
            found += images
    loose = [(entry.name, entry.stat().st_size) for entry in top if _is_image(entry)]
    if not names and loose:
        found, labels, names = loose, [0] * len(loose), [root.resolve().name or "images"]
    elif loose:
        log.warning("%d images lie in %s itself, beside its classes, and do not count", len(loose), root)
    if empty:
        log.warning("no images in %d directories of %s, which are no classes: %s", *_some(empty, root))
    if not found:
        raise UserError(f"{root} has no images: it needs a directory per class, with {_kinds()} files in it")
    files, sizes = zip(*found, strict=True)
    return ImageFiles(root, files, sizes, np.array(labels, np.int32)), tuple(names)


def _images(directory: os.DirEntry, prefix: str, entered: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Path and size of the images in a directory, and in those in it."""
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
        return sorted(filter(_counts, entries), key=lambda entry: entry.name)


def _counts(entry: os.DirEntry) -> bool:
    """Neither hidden nor a link that leads nowhere."""
    return not entry.name.startswith(".") and (not entry.is_symlink() or os.path.exists(entry.path))


def _is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(EXTENSIONS) and entry.is_file()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _held_out(images: ImageFiles, fraction: float) -> set[int]:
    """The indices of a fixed choice of images: at least one, if any."""
    if not fraction:
        return set()
    if len(images) < 2:
        raise UserError(
            f"{images.root} has one image only, and heldout_fraction={fraction} of them is to be held out"
        )
    hashes = [hashlib.sha256(os.fsencode(file)).digest() for file in images.files]
    ranked = sorted(range(len(images)), key=hashes.__getitem__)
    return set(ranked[: min(max(1, round(fraction * len(images))), len(images) - 1)])


def _relabelled(images: ImageFiles, names: tuple[str, ...], expected: tuple[str, ...]) -> ImageFiles:
    """With the labels that these class names have in training."""
    unknown = sorted(set(names) - set(expected))
    if len(names) == len(expected) == 1:
        return images
    if unknown:
        hint = suggest(unknown[0], expected)
        raise UserError(f"{images.root} has the class {unknown[0]!r}, which is none to train on{hint}")
    label = np.array([expected.index(name) for name in names], np.int32)
    return dataclasses.replace(images, labels=label[images.labels])


def _some(names: list[str], root: Path) -> tuple[int, Path, str]:
    return len(names), root, ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _kinds() -> str:
    return ", ".join(EXTENSIONS)
